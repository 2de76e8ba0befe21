//! What a carrier tells of a call, as Plivo writes it, signed.

use crate::{
    carrier::{CarrierStub, Create, signed_callback},
    events::HttpEvent,
    stack::PUBLIC_ORIGIN,
};
use anyhow::{Context, Result};
use shared::{
    secrets::Secrets,
    telephony::{CallbackEvent, token::CallbackToken},
};

/// How a call ended.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// `CallStatus`.
    pub status: &'static str,
    /// `HangupCauseCode`.
    pub code: &'static str,
    /// `HangupCauseName`.
    pub name: &'static str,
    /// Seconds talked.
    pub seconds: &'static str,
    /// Seconds billed.
    pub billed: &'static str,
    /// In US dollars.
    pub cost: &'static str,
}

/// 37 seconds of talk, billed as a minute.
pub const TALKED: Ending =
    Ending { status: "completed", code: "4000", name: "Normal Hangup", seconds: "37", billed: "60", cost: "0.0037" };
/// The line was busy.
pub const BUSY: Ending = unanswered("busy", "3010", "Busy Line");
/// Nobody answered.
pub const NO_ANSWER: Ending = unanswered("no-answer", "3000", "No Answer");
/// The callee declined.
pub const REJECTED: Ending = unanswered("failed", "3020", "Rejected");
/// There is no such number.
pub const INVALID: Ending = unanswered("failed", "3050", "Invalid Destination Number");

const fn unanswered(status: &'static str, code: &'static str, name: &'static str) -> Ending {
    Ending { status, code, name, seconds: "0", billed: "0", cost: "0.00" }
}

/// A recording's id and length.
pub const RECORDING: (&str, &str) = ("rec-1", "37");

impl CarrierStub {
    /// It rings.
    pub fn ring(&self, call: &Create) -> Result<HttpEvent> {
        self.tell(call, &call.ring_url, &[("CallStatus", "ringing"), ("Event", "Ring")])
    }

    /// It was answered: what is to be done?
    pub fn answer(&self, call: &Create) -> Result<HttpEvent> {
        self.tell(call, &call.answer_url, &[("CallStatus", "in-progress"), ("Event", "StartApp")])
    }

    /// It is over.
    pub fn hangup(&self, call: &Create, ending: &Ending) -> Result<HttpEvent> {
        let form = [
            ("CallStatus", ending.status),
            ("Event", "Hangup"),
            ("HangupCauseCode", ending.code),
            ("HangupCauseName", ending.name),
            ("HangupSource", "Callee"),
            ("Duration", ending.seconds),
            ("BillDuration", ending.billed),
            ("TotalCost", ending.cost),
        ];
        self.tell(call, &call.hangup_url, &form)
    }

    /// Its recording is ready.
    pub fn recording(&self, call: &Create, secrets: &Secrets) -> Result<HttpEvent> {
        let (id, seconds) = RECORDING;
        let url = format!("https://media.plivo.com/{}.mp3", call.call_uuid);
        let form = [("RecordUrl", url.as_str()), ("RecordingID", id), ("RecordingDuration", seconds)];
        self.tell(call, &recording_url(call, secrets)?, &form)
    }

    fn tell(&self, call: &Create, url: &str, form: &[(&str, &str)]) -> Result<HttpEvent> {
        let uuid = call.call_uuid.to_string();
        // Plivo writes numbers without their plus sign.
        let numbers = [call.from.trim_start_matches('+'), call.to.trim_start_matches('+')];
        let always = [("CallUUID", uuid.as_str()), ("From", numbers[0]), ("To", numbers[1]), ("Direction", "outbound")];
        signed_callback(&self.auth_token, url, &[always.as_slice(), form].concat())
    }
}

/// Where a call's recording is reported: what the answer document says, for tests that do not want it fetched.
pub fn recording_url(call: &Create, secrets: &Secrets) -> Result<String> {
    let token =
        token_of(call, secrets)?.encode(&secrets.callback_keys, "plivo", CallbackEvent::Recording).context("no key")?;
    Ok(callback_url(CallbackEvent::Recording, &token))
}

/// What the tokens in a call's URLs say.
pub fn token_of(call: &Create, secrets: &Secrets) -> Result<CallbackToken> {
    let token = call.answer_url.split('#').next().and_then(|url| url.rsplit('/').next()).unwrap_or_default();
    CallbackToken::decode(token, &secrets.callback_keys, "plivo", CallbackEvent::Answer)
        .context("the answer URL's token is not ours")
}

/// The URL of a callback.
pub fn callback_url(event: CallbackEvent, token: &str) -> String {
    format!("{PUBLIC_ORIGIN}/functions/v1/webhook-intake/plivo/{}/{token}", event.as_str())
}
