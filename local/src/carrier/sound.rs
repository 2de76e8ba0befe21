//! What a recording sounds like: silence, as an MP3 that any player takes.

use axum::{
    extract::{Path, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use std::sync::Arc;

use super::{World, api};

/// MPEG-1 layer III, 32 kbit/s, 44.1 kHz, one channel, no checksum.
const FRAME_HEADER: [u8; 4] = [0xFF, 0xFB, 0x10, 0xC0];
/// 144 × 32,000 / 44,100, without its fraction: no frame is padded.
const FRAME_BYTES: usize = 104;
/// Samples of a frame over samples of a second.
const FRAMES_A_SECOND: f64 = 44_100.0 / 1_152.0;
/// Seconds that a recording lasts whose length is not in its name.
const SECONDS: u32 = 5;

/// Silence. A frame whose side information is all zero has no sound data; the rest of it is skipped.
pub fn mp3(seconds: u32) -> Vec<u8> {
    let mut frame = FRAME_HEADER.to_vec();
    frame.resize(FRAME_BYTES, 0);
    let frames = (f64::from(seconds) * FRAMES_A_SECOND).ceil() as usize;
    frame.repeat(frames.max(1))
}

/// Gives a recording to the account that made it. Plivo's host of recordings can be told to ask who is there; this one always does.
pub(super) async fn recording(
    State(world): State<Arc<World>>,
    Path((auth_id, file)): Path<(String, String)>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = api::authenticate(&world, &auth_id, &headers) {
        return *response;
    }
    if !file.ends_with(".mp3") {
        return StatusCode::NOT_FOUND.into_response();
    }
    response()
}

/// A recording's answer.
pub(super) fn response() -> Response {
    ([(header::CONTENT_TYPE, "audio/mpeg")], mp3(SECONDS)).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_begins_where_the_one_before_says_it_ends() {
        let sound = mp3(37);
        assert_eq!(sound.len() % FRAME_BYTES, 0);
        assert!(sound.chunks(FRAME_BYTES).all(|frame| frame.starts_with(&FRAME_HEADER)));
        assert_eq!(sound.len() / FRAME_BYTES, 1_417);
    }
}
