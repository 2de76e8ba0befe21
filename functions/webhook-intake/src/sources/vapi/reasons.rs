//! The reasons for which Vapi's calls end: some six hundred, most of them of the form "in this phase, at this provider, this error".

use crate::sources::agents::EndReason;

/// What a reason means to us. Reasons of no family that is known map to nothing.
pub fn end_reason(code: &str) -> Option<EndReason> {
    single(code).or_else(|| family(code))
}

fn single(code: &str) -> Option<EndReason> {
    Some(match code {
        "customer-ended-call"
        | "customer-ended-call-before-warm-transfer"
        | "customer-ended-call-after-warm-transfer-attempt"
        | "customer-ended-call-during-transfer"
        | "call.ringing.sip-inbound-caller-hungup-before-call-connect" => EndReason::CustomerEnded,
        "assistant-ended-call"
        | "assistant-said-end-call-phrase"
        | "assistant-ended-call-with-hangup-task"
        | "assistant-ended-call-after-message-spoken"
        | "call.ringing.hook-executed-say"
        | "call.ending.hook-executed-say"
        // The carrier ended it after the conversation: neither side's doing that it names.
        | "vonage-completed"
        | "call.in-progress.twilio-completed-call"
        | "call.in-progress.sip-completed-call" => EndReason::AgentEnded,
        "assistant-forwarded-call"
        | "assistant-request-returned-forwarding-phone-number"
        | "call.ringing.hook-executed-transfer"
        | "call.ending.hook-executed-transfer" => EndReason::Transferred,
        "call.forwarding.operator-busy"
        | "call.forwarding.no-answer"
        | "call.in-progress.error-transfer-failed"
        | "call.in-progress.error-warm-transfer-max-duration"
        | "call.in-progress.error-warm-transfer-assistant-cancelled"
        | "call.in-progress.error-warm-transfer-silence-timeout"
        | "call.in-progress.error-warm-transfer-microphone-timeout" => EndReason::TransferFailed,
        "silence-timed-out" | "call.in-progress.error-assistant-did-not-receive-customer-audio" => EndReason::Silence,
        "exceeded-max-duration" => EndReason::MaxDuration,
        "voicemail" => EndReason::Machine,
        "customer-busy" => EndReason::Busy,
        "customer-did-not-answer"
        | "customer-did-not-give-microphone-permission"
        | "call.in-progress.error-providerfault-outbound-sip-408-request-timeout"
        | "call.in-progress.error-providerfault-outbound-sip-480-temporarily-unavailable" => EndReason::NoAnswer,
        "vonage-rejected" | "call.in-progress.error-providerfault-outbound-sip-403-forbidden" => EndReason::Rejected,
        "twilio-reported-customer-misdialed" => EndReason::InvalidNumber,
        "manually-canceled" | "scheduled-call-deleted" | "call-deleted" => EndReason::Cancelled,
        "call.start.error-subscription-concurrency-limit-reached"
        | "call.start.error-vapi-number-outbound-daily-limit" => EndReason::Capacity,
        "vonage-disconnected"
        | "vonage-failed-to-connect-call"
        | "twilio-failed-to-connect-call"
        | "phone-call-provider-closed-websocket"
        | "phone-call-provider-bypass-enabled-but-no-call-received"
        | "call.in-progress.error-sip-inbound-call-failed-to-connect"
        | "call.in-progress.error-sip-outbound-call-failed-to-connect"
        | "call.ringing.error-sip-inbound-call-failed-to-connect"
        | "call.in-progress.error-providerfault-outbound-sip-503-service-unavailable"
        | "call.in-progress.error-providerfault-transport-never-connected" => EndReason::CarrierTransient,
        "call.in-progress.error-providerfault-outbound-sip-407-proxy-authentication-required"
        | "call-start-error-neither-assistant-nor-server-set"
        | "assistant-not-valid"
        | "assistant-not-found"
        | "assistant-request-returned-invalid-assistant"
        | "assistant-request-returned-no-assistant"
        | "call.start.assistant-version-error-validation" => EndReason::Config,
        "assistant-request-failed"
        | "assistant-request-returned-error"
        | "assistant-request-returned-unspeakable-error"
        | "assistant-join-timed-out"
        | "worker-shutdown" => EndReason::OurFault,
        _ => return None,
    })
}

/// A family says what kind of error it is, whichever provider follows.
fn family(code: &str) -> Option<EndReason> {
    const FAMILIES: [(&str, EndReason); 6] = [
        ("call.start.error-vapifault-", EndReason::OurFault),
        ("call.start.error-", EndReason::Config),
        ("call.in-progress.error-configfault-", EndReason::Config),
        ("call.in-progress.error-vapifault-", EndReason::OurFault),
        ("call.in-progress.error-", EndReason::OurFault),
        ("pipeline-error-", EndReason::OurFault),
    ];
    FAMILIES.iter().find(|(prefix, _)| code.starts_with(prefix)).map(|(_, reason)| *reason)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_of_no_family_is_not_guessed_at() {
        for unknown in ["", "customer-ended", "pipeline", "call.in-progress.something", "voicemail-left"] {
            assert_eq!(end_reason(unknown), None, "{unknown}");
        }
        assert_eq!(end_reason("pipeline-error-new-voice-failed"), Some(EndReason::OurFault));
        assert_eq!(end_reason("call.in-progress.error-transfer-failed"), Some(EndReason::TransferFailed));
    }
}
