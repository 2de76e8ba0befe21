//! An organization's API key, as its own systems send it: the key is the tenant.

use crate::{Error, Result, http::Request};
use http::StatusCode;
use serde::Serialize;
use sha2::{Digest, Sha256};

/// Length of `tlk_` and eight hexadecimal digits, by which a key is found.
const PREFIX_LENGTH: usize = 12;
/// Length of a whole key: the prefix, an underscore and forty hexadecimal digits.
const KEY_LENGTH: usize = PREFIX_LENGTH + 1 + 40;

/// A key, as the database is shown it.
#[derive(Serialize, Debug, PartialEq)]
pub struct ApiKey<'a> {
    prefix: &'a str,
    sha256: String,
}

impl<'a> ApiKey<'a> {
    /// Whether a request carries what is meant to be a key.
    pub fn is_sent(request: &Request) -> bool {
        given(request).is_some()
    }

    /// The key in `Authorization: Bearer` or `x-api-key`. Error 401 without one, or for what cannot be one.
    pub fn of(request: &'a Request) -> Result<Self> {
        let (field, key) = given(request)
            .ok_or_else(|| Error::unauthorized("this route needs an organization's API key").at("authorization"))?;
        let is_key = key.len() == KEY_LENGTH
            && key.is_ascii()
            && key.starts_with("tlk_")
            && key.as_bytes()[PREFIX_LENGTH] == b'_';
        if !is_key {
            return Err(Error::new(
                StatusCode::UNAUTHORIZED,
                "invalid_api_key",
                "this is not an API key of an organization",
            )
            .at(field)
            .hint("A key starts with tlk_ and is shown once, when it is made."));
        }
        Ok(Self { prefix: &key[..PREFIX_LENGTH], sha256: hex::encode(Sha256::digest(key)) })
    }
}

fn given(request: &Request) -> Option<(&'static str, &str)> {
    let bearer = || {
        let (scheme, token) = request.header("authorization")?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(token.trim())
    };
    let key = request.header("x-api-key").map(|key| ("x-api-key", key.trim()));
    key.or_else(|| Some(("authorization", bearer()?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderMap, HeaderName, Method};

    const KEY: &str = "tlk_0123abcd_0123456789abcdef0123456789abcdef01234567";

    fn with_headers(headers: &[(&'static str, &str)]) -> Request {
        Request {
            method: Method::POST,
            path: String::new(),
            query: String::new(),
            headers: headers
                .iter()
                .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
                .collect::<HeaderMap>(),
            body: Bytes::new(),
        }
    }

    #[test]
    fn a_key_is_found_by_its_prefix_and_known_by_its_hash() {
        let bearer = format!("Bearer {KEY}");
        for headers in [[("authorization", bearer.as_str())], [("x-api-key", KEY)]] {
            let request = with_headers(&headers);
            let key = ApiKey::of(&request).unwrap();
            assert_eq!(key.prefix, "tlk_0123abcd");
            assert_eq!(key.sha256, hex::encode(Sha256::digest(KEY)));
        }
    }

    #[test]
    fn what_cannot_be_a_key_is_401_and_names_the_header() {
        for (name, value) in [
            ("authorization", "Bearer eyJ.a.b"),
            ("authorization", "Bearer "),
            ("x-api-key", "tlk_short"),
            ("x-api-key", &KEY.replace("tlk", "tlx")),
        ] {
            let error = ApiKey::of(&with_headers(&[(name, value)])).unwrap_err();
            assert_eq!((error.status, error.code.as_str()), (StatusCode::UNAUTHORIZED, "invalid_api_key"), "{value}");
            assert_eq!(error.field.as_deref(), Some(name));
        }
        assert_eq!(ApiKey::of(&with_headers(&[])).unwrap_err().code, "unauthorized");
        assert_eq!(ApiKey::of(&with_headers(&[("authorization", "Basic x")])).unwrap_err().code, "unauthorized");
    }
}
