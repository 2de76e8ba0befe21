//! Looks at a project through its API, as an app and as our functions ask it.

use super::Finding;
use crate::parts::http_client;
use anyhow::Result;
use serde_json::Value;
use std::time::Duration;
use url::Url;

/// Asks with each key that is given.
pub(super) async fn look(url: &Url, publishable: Option<&str>, secret: Option<&str>) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for (subject, key, is_secret) in [("the publishable key", publishable, false), ("the secret key", secret, true)] {
        if let Some(key) = key {
            findings.push(ask(url, subject, key, is_secret).await?);
        }
    }
    Ok(findings)
}

async fn ask(url: &Url, subject: &str, key: &str, is_secret: bool) -> Result<Finding> {
    // A secret key where everybody sees it gives everything away, and so is told before it is sent anywhere.
    if !is_secret && (key.starts_with("sb_secret_") || role_of(key).as_deref() == Some("service_role")) {
        return Ok(Finding::fault(
            subject,
            "NEXT_PUBLIC_SUPABASE_ANON_KEY holds a secret key, which every visitor of the app can read",
            "delete that key in the project's settings now, and put the publishable one there",
        ));
    }
    if is_secret && (key.starts_with("sb_publishable_") || role_of(key).as_deref() == Some("anon")) {
        return Ok(Finding::fault(
            subject,
            "SUPABASE_SERVICE_ROLE_KEY holds the publishable key: every function is refused",
            "put the secret key (sb_secret_…, or the old service_role) there and into the stack's secret",
        ));
    }
    let target = format!("{}/rest/v1/subscription_plans?select=id&limit=1", url.as_str().trim_end_matches('/'));
    let mut request = http_client()?.get(target).timeout(Duration::from_secs(10)).header("apikey", key);
    // The new keys are no JWTs and go as `apikey` alone; the old ones are both.
    if key.starts_with("ey") {
        request = request.bearer_auth(key);
    }
    let answer = match request.send().await.map_err(reqwest::Error::without_url) {
        Ok(answer) => answer,
        Err(error) => {
            let cure = "the address is https://<ref>.supabase.co; is the project paused?";
            return Ok(Finding::fault(subject, format!("{url} does not answer: {error}"), cure));
        }
    };
    let status = answer.status();
    let body: Value = serde_json::from_str(&answer.text().await.unwrap_or_default()).unwrap_or_default();
    let code = body["code"].as_str().unwrap_or_default();
    Ok(match (status.as_u16(), code) {
        (200, _) => Finding::good(subject),
        (401, _) => Finding::fault(
            subject,
            "the project does not know this key",
            "take it from the settings, API keys, of the project that the address names",
        ),
        (404, "PGRST205" | "42P01") => Finding::fault(
            subject,
            "the key is good, and PostgREST does not know our tables",
            "apply the migrations (docs/deploy.md); if they are applied: notify pgrst, 'reload schema'",
        ),
        (404, _) => {
            Finding::fault(subject, format!("{url} is no Supabase project"), "the address is https://<ref>.supabase.co")
        }
        _ => Finding::fault(
            subject,
            format!("{url} answered {status} {code} {}", body["message"].as_str().unwrap_or_default()),
            "the project's log, API, says more",
        ),
    })
}

/// The role that a key of the old kind is for, which stands in it for all to read.
fn role_of(key: &str) -> Option<String> {
    use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
    let claims = URL_SAFE_NO_PAD.decode(key.split('.').nth(1)?).ok()?;
    let claims: Value = serde_json::from_slice(&claims).ok()?;
    claims["role"].as_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keys_in_each_other_s_place_are_told_and_not_sent() {
        let nowhere: Url = "http://127.0.0.1:1".parse().unwrap();
        // {"role":"service_role"}
        for secret in ["sb_secret_x", "e30.eyJyb2xlIjoic2VydmljZV9yb2xlIn0.x"] {
            let found = look(&nowhere, Some(secret), None).await.unwrap();
            assert!(found[0].cause.contains("every visitor"), "{found:?}");
        }
        let found = look(&nowhere, None, Some("sb_publishable_x")).await.unwrap();
        assert!(found[0].cause.contains("every function is refused"), "{found:?}");
        let found = look(&nowhere, Some("sb_publishable_x"), None).await.unwrap();
        assert!(found[0].cause.contains("does not answer"), "{found:?}");
    }
}
