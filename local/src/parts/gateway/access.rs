//! Who may pass the gateway, and as whom: API keys in, tokens out.

use crate::parts::keys::Keys;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The header that carries the key.
pub(super) const API_KEY: HeaderName = HeaderName::from_static("apikey");
/// How long a token for a role is used before another one is made.
const TOKEN_REUSE: Duration = Duration::from_secs(120);

/// Made at, for anonymous requests, for the service's.
type RoleTokens = (Instant, HeaderValue, HeaderValue);

/// Knows the run's keys, and makes tokens of them.
pub(super) struct Access {
    keys: Keys,
    tokens: Mutex<Option<RoleTokens>>,
}

/// What an API key stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum KeyKind {
    Publishable,
    Secret,
}

impl Access {
    pub(super) fn new(keys: Keys) -> Self {
        Self { keys, tokens: Mutex::new(None) }
    }

    pub(super) fn keys(&self) -> &Keys {
        &self.keys
    }

    fn kind_of(&self, key: &str) -> Option<KeyKind> {
        if key == self.keys.publishable_key {
            Some(KeyKind::Publishable)
        } else if key == self.keys.secret_key {
            Some(KeyKind::Secret)
        } else {
            None
        }
    }

    /// The Authorization header with which a request goes on.
    pub(super) fn authorization(&self, headers: &HeaderMap, api_key: Option<&str>) -> Result<HeaderValue, Refusal> {
        let api_key = api_key.ok_or(Refusal::NoKey)?;
        let kind = self.kind_of(api_key).ok_or(Refusal::UnknownKey)?;
        if kind == KeyKind::Secret && is_browser(headers) {
            return Err(Refusal::SecretInBrowser);
        }
        match headers.get(header::AUTHORIZATION) {
            None => self.role_token(kind),
            Some(own) => match own.to_str().ok().and_then(bearer) {
                // Keys are no tokens: as one they are taken only beside themselves, as older clients send them.
                Some(token) if token.starts_with("sb_") && token == api_key => self.role_token(kind),
                Some(token) if token.starts_with("sb_") => Err(Refusal::UnknownKey),
                _ => Ok(own.clone()),
            },
        }
    }

    /// Whether it is the service that asks; a user may not, and who has no key at all is told so.
    pub(super) fn is_service(&self, headers: &HeaderMap, api_key: Option<&str>) -> Result<bool, Refusal> {
        let own = headers.get(header::AUTHORIZATION).and_then(|own| own.to_str().ok()).and_then(bearer);
        let key = api_key.or(own).ok_or(Refusal::NoKey)?;
        let kind = self.kind_of(key).ok_or(Refusal::UnknownKey)?;
        // A user's token beside a key makes it the user's request.
        Ok(kind == KeyKind::Secret && own.is_none_or(|token| token == key))
    }

    fn role_token(&self, kind: KeyKind) -> Result<HeaderValue, Refusal> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.as_ref().is_none_or(|(made, ..)| made.elapsed() > TOKEN_REUSE) {
            let header = |role| {
                let token = self.keys.role_jwt(role).map_err(|_| Refusal::Internal)?;
                HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| Refusal::Internal)
            };
            *tokens = Some((Instant::now(), header("anon")?, header("service_role")?));
        }
        match (tokens.as_ref(), kind) {
            (Some((_, anon, _)), KeyKind::Publishable) => Ok(anon.clone()),
            (Some((_, _, service)), KeyKind::Secret) => Ok(service.clone()),
            (None, _) => Err(Refusal::Internal),
        }
    }
}

fn bearer(authorization: &str) -> Option<&str> {
    let (scheme, token) = authorization.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_browser(headers: &HeaderMap) -> bool {
    headers
        .get(header::USER_AGENT)
        .and_then(|agent| agent.to_str().ok())
        .is_some_and(|agent| agent.starts_with("Mozilla/"))
}

/// Why the gateway itself does not let a request through, in the words of Supabase's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    NoKey,
    UnknownKey,
    SecretInBrowser,
    Internal,
}

impl Refusal {
    /// Status, message and hint.
    pub(super) fn words(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Self::NoKey => (
                StatusCode::UNAUTHORIZED,
                "No API key found in request",
                "No `apikey` request header or url param was found.",
            ),
            Self::UnknownKey => (StatusCode::UNAUTHORIZED, "Invalid API key", "Double check your Supabase API key."),
            Self::SecretInBrowser => (
                StatusCode::UNAUTHORIZED,
                "Forbidden use of secret API key in browser",
                "Secret API keys can only be used in a protected environment and should never be used in a browser. Delete this \
                 secret API key immediately.",
            ),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "The gateway cannot make a token", "See its log."),
        }
    }
}

/// The key from its header or from the query, and the query without it: PostgREST would take it for a filter.
pub(super) fn take_api_key(headers: &HeaderMap, query: Option<&str>) -> (Option<String>, Option<String>) {
    let mut key = headers.get(API_KEY).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let kept: Vec<&str> = query
        .unwrap_or_default()
        .split('&')
        .filter(|pair| match pair.strip_prefix("apikey=") {
            Some(value) => {
                key.get_or_insert_with(|| value.to_owned());
                false
            }
            None => !pair.is_empty(),
        })
        .collect();
    (key, (!kept.is_empty()).then(|| kept.join("&")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        Access::new(Keys::generate("http://127.0.0.1:1").unwrap())
    }

    fn headers(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect()
    }

    #[test]
    fn a_key_becomes_a_token_of_its_role_and_a_token_stays() {
        let access = access();
        let (publishable, secret) = (access.keys.publishable_key.clone(), access.keys.secret_key.clone());
        let none = HeaderMap::new();
        let anon = access.authorization(&none, Some(&publishable)).unwrap();
        let service = access.authorization(&none, Some(&secret)).unwrap();
        assert_ne!(anon, service);
        let as_bearer = headers(&[(header::AUTHORIZATION, &format!("Bearer {secret}"))]);
        assert_eq!(access.authorization(&as_bearer, Some(&secret)).unwrap(), service);
        assert_eq!(access.authorization(&as_bearer, Some(&publishable)), Err(Refusal::UnknownKey));
        let user = headers(&[(header::AUTHORIZATION, "Bearer a.b.c")]);
        assert_eq!(access.authorization(&user, Some(&secret)).unwrap(), "Bearer a.b.c");
    }

    #[test]
    fn keys_are_asked_for_and_secret_ones_are_not_for_browsers() {
        let access = access();
        let browser = headers(&[(header::USER_AGENT, "Mozilla/5.0 (X11; Linux x86_64)")]);
        assert_eq!(access.authorization(&browser, None), Err(Refusal::NoKey));
        assert_eq!(access.authorization(&browser, Some("sb_secret_other")), Err(Refusal::UnknownKey));
        assert_eq!(access.authorization(&browser, Some(&access.keys.secret_key)), Err(Refusal::SecretInBrowser));
        assert!(access.authorization(&browser, Some(&access.keys.publishable_key)).is_ok());
    }

    #[test]
    fn a_key_in_the_query_is_taken_out_of_it() {
        let (key, query) = take_api_key(&HeaderMap::new(), Some("select=id&apikey=sb_publishable_x&limit=1"));
        assert_eq!(key.as_deref(), Some("sb_publishable_x"));
        assert_eq!(query.as_deref(), Some("select=id&limit=1"));
        assert_eq!(take_api_key(&HeaderMap::new(), Some("apikey=k")), (Some("k".to_owned()), None));
    }
}
