//! The token that opens Vonage's API and its files: the application signs it itself (RS256).

use crate::{Error, Result};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use ring::{
    rand::SystemRandom,
    signature::{RSA_PKCS1_SHA256, RsaKeyPair},
};
use serde_json::json;
use uuid::Uuid;

/// How long a token lasts, in seconds.
const LIFETIME: i64 = 300;

/// A token of this application, signed with its private key in PEM (PKCS#8).
pub fn token(application_id: &str, private_key: &str) -> Result<String> {
    let unusable = || Error::internal("the application's private key is no RSA key in PKCS#8");
    let encoded: String = private_key.lines().map(str::trim).filter(|line| !line.starts_with("-----")).collect();
    let key = RsaKeyPair::from_pkcs8(&STANDARD.decode(encoded).map_err(|_| unusable())?).map_err(|_| unusable())?;
    let now = chrono::Utc::now().timestamp();
    let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = part(json!({ "alg": "RS256", "typ": "JWT" }));
    let claims = part(json!({
        "application_id": application_id, "iat": now, "exp": now + LIFETIME, "jti": Uuid::new_v4(),
    }));
    let signed = format!("{header}.{claims}");
    let mut signature = vec![0; key.public().modulus_len()];
    key.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).map_err(|_| unusable())?;
    Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_key_signs_nothing() {
        for key in ["", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----", "not base64 !"] {
            let error = token("app", key).unwrap_err();
            assert!(!error.message.contains("AAAA"), "{}", error.message);
        }
    }
}
