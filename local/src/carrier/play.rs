//! The life of one call, from the queue to its record, with time compressed.

use super::{
    World,
    answer::{self, Then},
    call::{Call, Detection, Dialect, Hook, Socket, Stage, digits},
    callback::{self, Callback, Told},
    cause::{self, Cause},
    faults::Fault,
    outcome::Outcome,
    signature::Pairs,
    telnyx, twilio, vonage,
};
use chrono::Utc;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::{sync::Arc, time::Duration};
use uuid::Uuid;

/// How long the stages of a call take in real time. A range's place is the call's own, so that it repeats with the seed.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Pace {
    /// From the create to the first ring, in milliseconds: least and most.
    pub queue_ms: (u64, u64),
    /// From the first ring to the answer, or to giving up, in milliseconds: least and most.
    pub ring_ms: (u64, u64),
    /// Microseconds of real time that a second of talk takes.
    pub talk_second_us: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { queue_ms: (10, 40), ring_ms: (50, 180), talk_second_us: 1_500 }
    }
}

/// How many times as long a long call lasts: half a minute at most, and answered before anybody believes that it was never made.
const LONGER: u64 = 80;

impl Pace {
    /// That of a long call.
    fn of_a_long_call(self) -> Self {
        let longer = |(least, most): (u64, u64)| (least * LONGER, most * LONGER);
        Self {
            queue_ms: longer(self.queue_ms),
            ring_ms: longer(self.ring_ms),
            talk_second_us: self.talk_second_us * LONGER,
        }
    }

    fn place(range: (u64, u64), place: u16) -> Duration {
        Duration::from_millis(range.0 + range.1.saturating_sub(range.0) * u64::from(place) / 1_000)
    }
}

/// Plays the call until it is over. The hang-up through the API ends it wherever it is.
pub(super) async fn play(world: Arc<World>, uuid: Uuid) {
    let Some(hang_up) = world.read(uuid, |call| Arc::clone(&call.hang_up)) else { return };
    let (cause, talk_seconds) = tokio::select! {
        end = live(&world, uuid) => end,
        () = hang_up.notified() => hung_up(&world, uuid),
    };
    end(&world, uuid, cause, talk_seconds);
}

/// The call as it goes by itself: how it ends and how many seconds were talked.
async fn live(world: &Arc<World>, uuid: Uuid) -> (Cause, u32) {
    let pace = match world.book().place(uuid) {
        Some(place) if place < world.options.long_calls => world.options.pace.of_a_long_call(),
        _ => world.options.pace,
    };
    world.step(uuid, "initiated");
    let Some((fate, time_limit)) = world.read(uuid, |call| (call.fate, call.request.time_limit)) else {
        return (cause::CANCELLED, 0);
    };
    tokio::time::sleep(Pace::place(pace.queue_ms, fate.pace[0])).await;
    if fate.outcome == Outcome::Invalid {
        return (cause::of(&fate), 0);
    }

    world.change(uuid, |call| call.stage = Stage::Ringing);
    if let Some(Some(hook)) = world.read(uuid, |call| call.request.ring.clone()) {
        world.send(uuid, "Ring", hook, &[("CallStatus", "ringing")]);
    }
    world.step(uuid, "ringing");
    let ring = match fate.outcome {
        Outcome::NoAnswer => Duration::from_millis(pace.ring_ms.1),
        _ => Pace::place(pace.ring_ms, fate.pace[1]),
    };
    tokio::time::sleep(ring).await;
    if !matches!(fate.outcome, Outcome::Answered | Outcome::Machine) {
        return (cause::of(&fate), 0);
    }

    world.change(uuid, |call| {
        call.stage = Stage::InProgress;
        call.answered_at = Some(Utc::now());
        call.machine = fate.outcome == Outcome::Machine;
    });
    world.step(uuid, "answered");
    world.detected(uuid);
    if fate.outcome == Outcome::Machine {
        match world.read(uuid, |call| call.request.machine_detection.clone()) {
            Some(Detection::HangUp) => {
                tokio::time::sleep(Duration::from_micros(5 * pace.talk_second_us)).await;
                return (cause::MACHINE, 5);
            }
            Some(Detection::CallBack(hook)) => {
                let params: &[_] = if matches!(world.dialect(uuid), Some(Dialect::Twilio(_))) {
                    &[("AnsweredBy", "machine_start"), ("MachineDetectionDuration", "2100")]
                } else {
                    &[("CallStatus", "in-progress"), ("Machine", "true"), ("IfMachine", "continue")]
                };
                world.send(uuid, "MachineDetection", hook, params);
            }
            Some(Detection::Off | Detection::Tell) | None => {}
        }
    }
    let instructions = match world.dialect(uuid) {
        // It brought everything along.
        Some(Dialect::Telnyx(_)) => answer::Instructions { recording: None, socket: None, then: Then::Talk },
        _ => match fetch_document(world, uuid).await {
            Ok(instructions) => instructions,
            Err(cause) => return (cause, 1),
        },
    };
    if let Some((url, uri)) = instructions.socket {
        let socket = Socket { id: Uuid::new_v4(), uri, hook: Hook { url, get: false } };
        world.change(uuid, |call| call.socket = Some(socket));
        world.step(uuid, "connected");
    }
    if let Some((url, method)) = instructions.recording {
        let get = method.eq_ignore_ascii_case("GET");
        world.recordings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(uuid, Hook { url, get });
    }
    match instructions.then {
        Then::Hangup => (cause::XML_HANGUP, 1),
        Then::End => (cause::END_OF_XML, 1),
        Then::Talk => {
            let (seconds, cause) = if fate.talk_seconds > time_limit {
                (time_limit, cause::TIME_LIMIT)
            } else {
                (fate.talk_seconds, cause::of(&fate))
            };
            tokio::time::sleep(Duration::from_micros(u64::from(seconds) * pace.talk_second_us)).await;
            (cause, seconds)
        }
    }
}

/// The answer document, from the answer URL or else from the fallback URL; the error is why the call ends without one.
async fn fetch_document(world: &Arc<World>, uuid: Uuid) -> Result<answer::Instructions, Cause> {
    let hooks = world.read(uuid, |call| (call.request.answer.clone(), call.request.fallback.clone()));
    let (answer_hook, fallback) = hooks.ok_or(cause::CANCELLED)?;
    let mut reason = cause::ANSWER_UNREACHABLE;
    for hook in std::iter::once(answer_hook).chain(fallback) {
        let callback = match world.dialect(uuid) {
            Some(Dialect::Vonage(_)) => vonage::document(world, uuid, hook),
            _ => world.callback(uuid, "StartApp", hook, &[("CallStatus", "in-progress")]),
        };
        let Some(callback) = callback else { break };
        let key: Vec<&str> = callback.key.iter().map(String::as_str).collect();
        if world.faults.strikes(Fault::Delay, world.options.seed, &key) {
            tokio::time::sleep(Duration::from_millis(world.faults.get().callback_delay_ms)).await;
        }
        let Some(answer) = callback::deliver(world, &callback).await.filter(|answer| answer.status == 200) else {
            reason = cause::ANSWER_UNREACHABLE;
            continue;
        };
        let kind = answer.content_type.split(';').next().unwrap_or_default().trim();
        let read = match (world.dialect(uuid), kind) {
            (Some(Dialect::Vonage(_)), "application/json") => vonage::read_ncco(&answer.body),
            (Some(Dialect::Twilio(_)), "application/xml" | "text/xml") => answer::read_twiml(&answer.body),
            (Some(Dialect::Plivo), "application/xml" | "text/xml") => answer::read(&answer.body),
            (_, other) => Err(format!("the content type is {other:?}")),
        };
        match read {
            Ok(instructions) => return Ok(instructions),
            Err(wrong) => {
                world.note(json!({"event": "invalid_xml", "call_uuid": uuid, "wrong": wrong, "document": answer.body}));
                reason = cause::INVALID_XML;
            }
        }
    }
    Err(reason)
}

/// How a call ends that is hung up through the API, wherever it is.
fn hung_up(world: &World, uuid: Uuid) -> (Cause, u32) {
    let talked = world.read(uuid, |call| {
        let answered = call.answered_at?;
        let real = (Utc::now() - answered).num_microseconds().unwrap_or(0).max(0) as u64;
        Some(real.div_ceil(world.options.pace.talk_second_us.max(1)).clamp(1, u64::from(u32::MAX)) as u32)
    });
    match talked.flatten() {
        Some(seconds) => (cause::API_HANGUP, seconds),
        None => (cause::CANCELLED, 0),
    }
}

/// Closes the call's record and tells the caller: the recording first, the hang-up after it, neither waiting for the other.
fn end(world: &Arc<World>, uuid: Uuid, cause: Cause, talk_seconds: u32) {
    let billing = world.options.billing;
    let closed = world.change(uuid, |call| {
        call.stage = Stage::Ended;
        call.ended_at = Some(Utc::now());
        call.cause = Some(cause);
        call.talk_seconds = if call.answered_at.is_some() { talk_seconds.max(1) } else { 0 };
        call.billed_seconds = billing.billed(call.talk_seconds);
        (call.request.hangup.clone(), hangup_params(call, &billing), line(call))
    });
    let Some((hook, params, line)) = closed else { return };
    world.note(line);
    let recording = world.recordings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(&uuid);
    match world.dialect(uuid) {
        Some(Dialect::Twilio(progress)) => return end_at_twilio(world, uuid, progress.recording),
        Some(Dialect::Telnyx(_)) => return world.step(uuid, "completed"),
        Some(Dialect::Vonage(_)) => {
            if let Some(hook) = recording {
                vonage::recorded(world, uuid, hook);
            }
            return world.step(uuid, "completed");
        }
        Some(Dialect::Plivo) | None => {}
    }
    if let Some(recording) = recording {
        let params = world.read(uuid, |call| recording_params(call, world)).unwrap_or_default();
        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        world.send(uuid, "Recording", recording, &params);
    }
    let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    world.send(uuid, "Hangup", hook, &params);
}

/// The same in Twilio's words. Who was not reached was not recorded.
fn end_at_twilio(world: &Arc<World>, uuid: Uuid, recording: Option<Hook>) {
    let told = world.read(uuid, |call| {
        let hook = recording.filter(|_| call.answered_at.is_some())?;
        Some((hook, twilio::recording_params(call, &world.url)))
    });
    if let Some(Some((hook, params))) = told {
        let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
        world.send(uuid, "Recording", hook, &params);
    }
    world.step(uuid, "completed");
}

/// What every callback of a call says about it. Numbers come without their plus.
pub(super) fn common_params(call: &Call, event: &str) -> Pairs {
    let uuid = call.uuid.to_string();
    let mut params: Pairs = [
        ("ALegRequestUUID", uuid.as_str()),
        ("ALegUUID", &uuid),
        ("CallUUID", &uuid),
        ("CallerName", &call.request.caller_name),
        ("Direction", "outbound"),
        ("From", &digits(&call.request.from)),
        ("ParentAuthID", &call.auth_id),
        ("RequestUUID", &uuid),
        ("STIRVerification", "Not Applicable"),
        ("SessionStart", &call.created_at.format("%Y-%m-%d %H:%M:%S%.6f").to_string()),
        ("To", &digits(&call.request.to)),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    // A recording's callback has no event of its own.
    if event != "Recording" {
        params.push(("Event".to_owned(), event.to_owned()));
    }
    let told = matches!(call.request.machine_detection, Detection::Tell | Detection::HangUp);
    if call.machine && told && matches!(event, "StartApp" | "Hangup") {
        params.push(("Machine".to_owned(), "true".to_owned()));
    }
    params
}

fn hangup_params(call: &Call, billing: &super::Billing) -> Pairs {
    let time = |at: chrono::DateTime<Utc>| at.format("%Y-%m-%d %H:%M:%S").to_string();
    let cause = call.cause.unwrap_or(cause::CANCELLED);
    let mut params: Pairs = [
        ("BillDuration", call.billed_seconds.to_string()),
        ("BillRate", billing.rate()),
        ("CallStatus", cause.status.to_owned()),
        ("Duration", call.talk_seconds.to_string()),
        ("EndTime", call.ended_at.map(time).unwrap_or_default()),
        ("HangupCause", cause.cause.to_owned()),
        ("HangupCauseCode", cause.code.to_string()),
        ("HangupCauseName", cause.name.to_owned()),
        ("HangupSource", cause.source.to_owned()),
        ("StartTime", time(call.created_at)),
        ("TotalCost", billing.cost(call.billed_seconds)),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into();
    if let Some(answered) = call.answered_at {
        params.push(("AnswerTime".to_owned(), time(answered)));
    }
    params
}

fn recording_params(call: &Call, world: &World) -> Pairs {
    let id = Uuid::new_v4();
    let ends = call.ended_at.unwrap_or(call.created_at).timestamp_millis();
    let length = i64::from(call.talk_seconds) * 1_000;
    [
        ("CallStatus", "completed".to_owned()),
        ("RecordUrl", format!("{}recordings/{}/{id}.mp3", world.url, call.auth_id)),
        ("RecordingDuration", call.talk_seconds.to_string()),
        ("RecordingDurationMs", length.to_string()),
        ("RecordingEndMs", ends.to_string()),
        ("RecordingID", id.to_string()),
        ("RecordingStartMs", (ends - length).to_string()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .into()
}

/// The line of an ended call in the carrier's log.
fn line(call: &Call) -> serde_json::Value {
    json!({
        "event": "end",
        "call_uuid": call.uuid,
        "to": digits(&call.request.to),
        "from": digits(&call.request.from),
        "nth": call.nth,
        "outcome": call.fate.outcome,
        "live_from": call.created_at,
        "live_to": call.ended_at,
        "answered_at": call.answered_at,
        "talk_seconds": call.talk_seconds,
        "billed_seconds": call.billed_seconds,
        "code": call.cause.map(|cause| cause.code),
    })
}

impl World {
    /// A callback of a call in Plivo's or Twilio's words, not yet sent.
    pub(super) fn callback(&self, uuid: Uuid, event: &str, hook: Hook, extra: &[(&str, &str)]) -> Option<Callback> {
        let (mut params, is_twilio) = self.read(uuid, |call| {
            let is_twilio = matches!(call.request.dialect, Dialect::Twilio(_));
            (if is_twilio { twilio::common_params(call) } else { common_params(call, event) }, is_twilio)
        })?;
        params.extend(extra.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let told = if is_twilio { Told::Twilio(params) } else { Told::Plivo(params) };
        self.address(uuid, event, hook, told)
    }

    /// A callback of a call, not yet sent.
    pub(super) fn address(&self, uuid: Uuid, event: &str, hook: Hook, told: Told) -> Option<Callback> {
        let (auth_id, key) = self.read(uuid, |call| {
            (call.auth_id.clone(), [digits(&call.request.to), call.nth.to_string(), event.to_owned()])
        })?;
        Some(Callback { call: uuid, key, hook, auth_token: self.account(&auth_id)?.auth_token, told })
    }

    fn dialect(&self, uuid: Uuid) -> Option<Dialect> {
        self.read(uuid, |call| call.request.dialect.clone())
    }

    /// Tells a step of a call to whoever is told of steps.
    fn step(self: &Arc<Self>, uuid: Uuid, step: &str) {
        let progress = match self.dialect(uuid) {
            Some(Dialect::Twilio(progress)) => progress,
            Some(Dialect::Telnyx(_)) => return telnyx::step(self, uuid, step),
            Some(Dialect::Vonage(_)) => return vonage::step(self, uuid, step),
            Some(Dialect::Plivo) | None => return,
        };
        let hook = progress.callback.filter(|_| progress.steps.iter().any(|asked| asked == step));
        let told = self.read(uuid, |call| twilio::step_params(call, step));
        if let Some((hook, params)) = hook.zip(told) {
            let params: Vec<(&str, &str)> = params.iter().map(|(name, value)| (*name, value.as_str())).collect();
            self.send(uuid, step, hook, &params);
        }
    }

    /// Tells what picked up, at the carriers that tell of people too.
    fn detected(self: &Arc<Self>, uuid: Uuid) {
        let is_asked = self.read(uuid, |call| {
            matches!(call.request.dialect, Dialect::Telnyx(_) | Dialect::Vonage(_))
                && matches!(call.request.machine_detection, Detection::Tell)
        });
        if is_asked == Some(true) {
            self.step(uuid, "detected");
        }
    }

    /// Sends a callback that the call does not wait for.
    fn send(self: &Arc<Self>, uuid: Uuid, event: &str, hook: Hook, extra: &[(&str, &str)]) {
        if let Some(callback) = self.callback(uuid, event, hook, extra) {
            callback::send(self, callback);
        }
    }
}
