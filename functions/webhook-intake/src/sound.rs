//! Sound that comes with an event: it is in Storage before the event is told, so that neither a row nor a message ever carries it.

use crate::{
    Intake,
    recordings::{self, BUCKET},
    sources::{EVENT_LIMIT, Event, OpenSource, Payload, Sound, Source},
};
use shared::{
    Error, Result,
    http::Request,
    storage::{Object, Stored},
};
use std::{borrow::Cow, time::Duration};
use uuid::Uuid;

/// How long Storage may take.
const UPLOAD_LIMIT: Duration = Duration::from_secs(15);

/// A verified request without its sound, and where that is now. Each delivery has an object of its own: the database says which of them is
/// a call's recording, and has the others deleted. Error 413 for a request that is too large without any sound, 503 when Storage is away:
/// nobody else could keep it, and the sender has it still.
pub async fn set_aside<'a>(
    intake: &Intake,
    source: &dyn Source,
    open: &OpenSource,
    request: &'a Request,
) -> Result<(Cow<'a, Request>, Option<Stored>)> {
    let Some(Sound { audio, rest }) = source.set_aside(request) else {
        return Ok((Cow::Borrowed(request.bounded(EVENT_LIMIT)?), None));
    };
    let request = Request { body: rest, ..request.clone() };
    request.bounded(EVENT_LIMIT)?;
    let Some(kind) = recordings::kind_of_sound(&audio) else {
        tracing::warn!(
            source = source.name(),
            bytes = audio.len(),
            "what came as sound is none; the event is kept without it"
        );
        return Ok((Cow::Owned(request), None));
    };
    // The wall of the bucket is the first part of a path.
    let owner = open.organization_id.map_or_else(|| "platform".to_owned(), |id| id.to_string());
    let path = format!("{owner}/{}.{}", Uuid::new_v4(), kind.extension);
    let bytes = audio.len() as u64;
    let object = Object { content_type: kind.content_type.to_owned(), length: Some(bytes), body: audio.into() };
    match intake.storage.upload(BUCKET, &path, object, UPLOAD_LIMIT).await {
        Ok(()) => Ok((Cow::Owned(request), Some(Stored { path, bytes, content_type: kind.content_type.to_owned() }))),
        Err(error) if error.code == "object_too_large" => {
            tracing::error!(bytes, "Storage takes no sound of this size; the event is kept without it");
            Ok((Cow::Owned(request), None))
        }
        Err(error) => {
            tracing::error!(error = %error, "Storage took no sound; the sender has to come again");
            Err(Error::unavailable("Storage does not take the recording"))
        }
    }
}

/// Names the object to the event that is about its call.
pub fn attach(events: &mut [Event], stored: Option<&Stored>) {
    for event in events {
        if let Payload::Agent(report) = &mut event.payload {
            report.recording = stored.cloned();
            return;
        }
    }
}

/// Takes an object back of which nobody has been told.
pub async fn forget(intake: &Intake, stored: Option<&Stored>) {
    let Some(stored) = stored else { return };
    if let Err(error) = intake.storage.delete(BUCKET, std::slice::from_ref(&stored.path)).await {
        tracing::error!(error = %error, path = stored.path, "an object that nobody was told of is left in Storage");
    }
}
