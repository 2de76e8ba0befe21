//! Where recordings may be fetched from. A URL in a callback is a stranger's text, even when it is signed: nothing is asked but the
//! carrier's own hosts and the storage that it documents.

use url::Url;

/// What a URL is to an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The carrier's own host, which may see the account's credentials.
    Api,
    /// Storage that the carrier, or a voice agent, documents. The URL itself opens it.
    Storage,
    /// Not to be asked.
    Elsewhere,
}

/// Hosts that are the carrier itself; a leading dot takes in what is below.
fn api_hosts(provider: &str) -> &'static [&'static str] {
    match provider {
        "plivo" => &["api.plivo.com", "media.plivo.com"],
        "twilio" => &["api.twilio.com"],
        "telnyx" => &["api.telnyx.com"],
        "vonage" => &[".nexmo.com", ".vonage.com"],
        _ => &[],
    }
}

/// Hosts that store for the carrier.
fn storage_hosts(provider: &str) -> &'static [&'static str] {
    match provider {
        "plivo" => &[".plivo.com"],
        "twilio" => &[".twilio.com", ".twiliocdn.com"],
        "telnyx" => &[".telnyx.com", ".telnyxstorage.com", ".telnyxcloudstorage.com"],
        _ => &[],
    }
}

/// Hosts on which voice agents store, for whichever carrier.
const AGENT_HOSTS: [&str; 3] = ["storage.vapi.ai", "dxc03zgurdly9.cloudfront.net", ".retellai.com"];
/// Telnyx's buckets, in whichever region.
const TELNYX_BUCKET: &str = "telephony-recorder-";

/// What `url` is to an account of `provider` whose API is at `api_base`. Where `local`, loopback stands in for the carrier.
pub fn place(provider: &str, url: &Url, api_base: &str, local: bool) -> Place {
    let Some(host) = url.host_str() else { return Place::Elsewhere };
    if local && url.scheme() == "http" && matches!(host, "127.0.0.1" | "localhost" | "[::1]") {
        let ours = Url::parse(api_base).is_ok_and(|base| base.origin() == url.origin());
        return if ours { Place::Api } else { Place::Storage };
    }
    // A port, a user or a plain connection is nothing that any of them documents.
    if url.scheme() != "https" || url.port().is_some() || !url.username().is_empty() || url.password().is_some() {
        return Place::Elsewhere;
    }
    let is_one_of = |hosts: &[&str]| {
        hosts.iter().any(|known| match known.strip_prefix('.') {
            Some(domain) => host == domain || host.ends_with(known),
            None => host == *known,
        })
    };
    if is_one_of(api_hosts(provider)) {
        Place::Api
    } else if is_one_of(storage_hosts(provider))
        || is_one_of(&AGENT_HOSTS)
        || provider == "telnyx" && is_telnyx_bucket(host, url.path())
    {
        Place::Storage
    } else {
        Place::Elsewhere
    }
}

/// `s3[.<region>].amazonaws.com/telephony-recorder-…/` or `telephony-recorder-….s3[.<region>].amazonaws.com`.
fn is_telnyx_bucket(host: &str, path: &str) -> bool {
    let Some(service) = host.strip_suffix(".amazonaws.com") else { return false };
    let is_s3 = |name: &str| name == "s3" || name.starts_with("s3.") && !name[3..].contains('.');
    if is_s3(service) {
        return path.trim_start_matches('/').starts_with(TELNYX_BUCKET);
    }
    service.split_once('.').is_some_and(|(bucket, rest)| bucket.starts_with(TELNYX_BUCKET) && is_s3(rest))
}

/// The URL of the sound itself. Twilio's names the recording, and gives it in the form that the name ends in.
pub fn media_url(provider: &str, told: &str) -> Option<Url> {
    let mut url = Url::parse(told).ok()?;
    if provider == "twilio" && url.path().contains("/Recordings/") && !url.path().rsplit('/').next()?.contains('.') {
        url.set_path(&format!("{}.mp3", url.path()));
    }
    Some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(provider: &str, url: &str) -> Place {
        place(provider, &Url::parse(url).unwrap(), "https://api.plivo.com", false)
    }

    #[test]
    fn each_carrier_is_asked_at_its_own_hosts() {
        for (provider, url, expected) in [
            ("plivo", "https://media.plivo.com/v1/Account/MA/Recording/r.mp3", Place::Api),
            ("plivo", "https://eu.media.plivo.com/r.mp3", Place::Storage),
            ("twilio", "https://api.twilio.com/2010-04-01/Accounts/AC/Recordings/RE.mp3", Place::Api),
            ("twilio", "https://media.twiliocdn.com/r.mp3", Place::Storage),
            ("telnyx", "https://s3.amazonaws.com/telephony-recorder-prod/a/r.mp3?X-Amz-Signature=s", Place::Storage),
            ("telnyx", "https://s3.eu-central-1.amazonaws.com/telephony-recorder-prod-fr5/r.mp3", Place::Storage),
            ("telnyx", "https://telephony-recorder-prod.s3.us-east-1.amazonaws.com/r.mp3", Place::Storage),
            ("vonage", "https://api.nexmo.com/v1/files/x", Place::Api),
            ("vonage", "https://api-eu-1.nexmo.com/v1/files/x", Place::Api),
            ("plivo", "https://storage.vapi.ai/x.wav", Place::Storage),
            ("telnyx", "https://dxc03zgurdly9.cloudfront.net/x/recording.wav", Place::Storage),
        ] {
            assert_eq!(at(provider, url), expected, "{provider} {url}");
        }
    }

    #[test]
    fn nothing_else_is_asked() {
        for (provider, url) in [
            ("plivo", "https://media.plivo.com.evil.example/r.mp3"),
            ("plivo", "https://evilplivo.com/r.mp3"),
            ("plivo", "http://media.plivo.com/r.mp3"),
            ("plivo", "https://media.plivo.com:8443/r.mp3"),
            ("plivo", "https://user@media.plivo.com/r.mp3"),
            ("plivo", "https://api.twilio.com/r.mp3"),
            ("plivo", "https://169.254.169.254/latest/meta-data"),
            ("plivo", "http://127.0.0.1:1/r.mp3"),
            ("plivo", "file:///etc/passwd"),
            ("telnyx", "https://s3.amazonaws.com/somebody-elses/r.mp3"),
            ("telnyx", "https://s3.amazonaws.com.evil.example/telephony-recorder-prod/r.mp3"),
            ("telnyx", "https://telephony-recorder-prod.s3.evil.example.amazonaws.com/r.mp3"),
            ("twilio", "https://s3.amazonaws.com/telephony-recorder-prod/r.mp3"),
            ("plivo", "https://storage.googleapis.com/somebody/r.mp3"),
            ("unknown", "https://media.plivo.com/r.mp3"),
        ] {
            assert_eq!(at(provider, url), Place::Elsewhere, "{provider} {url}");
        }
    }

    #[test]
    fn loopback_is_the_carrier_on_one_machine_alone() {
        let url = Url::parse("http://127.0.0.1:4000/r.mp3").unwrap();
        assert_eq!(place("plivo", &url, "http://127.0.0.1:4000", true), Place::Api);
        assert_eq!(place("plivo", &url, "http://127.0.0.1:4001", true), Place::Storage);
        assert_eq!(place("plivo", &url, "http://127.0.0.1:4000", false), Place::Elsewhere);
    }

    #[test]
    fn a_recording_of_twilio_s_is_asked_for_as_mp3() {
        let url = |told| media_url("twilio", told).unwrap().to_string();
        assert_eq!(
            url("https://api.twilio.com/2010-04-01/Accounts/AC/Recordings/RE"),
            "https://api.twilio.com/2010-04-01/Accounts/AC/Recordings/RE.mp3"
        );
        assert_eq!(
            url("https://api.twilio.com/2010-04-01/Accounts/AC/Recordings/RE.wav"),
            "https://api.twilio.com/2010-04-01/Accounts/AC/Recordings/RE.wav"
        );
        assert_eq!(media_url("plivo", "not a url"), None);
    }
}
