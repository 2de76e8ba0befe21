//! The keys of one run: what signs its users' tokens, what its clients send, and what its functions keep secret.

use anyhow::{Context, Result};
use base64::{
    Engine,
    engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD},
};
use chrono::Utc;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use p256::{
    SecretKey,
    elliptic_curve::sec1::ToEncodedPoint,
    pkcs8::{EncodePrivateKey, LineEnding},
};
use rand::Rng;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use shared::secrets::Secrets;
use uuid::Uuid;

/// How long a user's token is valid, in seconds. Supabase's default is an hour; a stack that is left running should not log its user out.
const USER_SECONDS: i64 = 24 * 3600;
/// How long the tokens are valid that the gateway puts in place of an API key, in seconds.
const GATEWAY_SECONDS: i64 = 300;

/// All keys of a run. Nothing of it is written to disk, save the public half that PostgREST reads.
#[derive(Clone)]
pub struct Keys {
    /// `sb_publishable_…`: may be in a browser; makes a request anonymous.
    pub publishable_key: String,
    /// `sb_secret_…`: makes a request the service's.
    pub secret_key: String,
    /// Issuer of the tokens, `<origin>/auth/v1`.
    pub issuer: String,
    signing_key: EncodingKey,
    public_key: Value,
    key_id: String,
    legacy_secret: Vec<u8>,
    callback_key: [u8; 32],
    seal_key: [u8; 32],
    nudge_key: String,
}

/// The claims of a token, as Supabase Auth makes them.
#[derive(Debug, Clone, Serialize)]
pub struct Claims {
    /// Issuer.
    pub iss: String,
    /// The user's id; absent in the gateway's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sub: Option<Uuid>,
    /// Audience, `authenticated`; absent in the gateway's tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub aud: Option<String>,
    /// The role PostgREST switches to.
    pub role: String,
    /// The user's email address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub email: Option<String>,
    /// The sign-in it stems from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session_id: Option<Uuid>,
    /// Seconds since 1970 at which it was made.
    pub iat: i64,
    /// Seconds since 1970 after which it is refused.
    pub exp: i64,
}

impl Keys {
    /// New keys for a stack at this origin.
    pub fn generate(origin: &str) -> Result<Self> {
        let mut random = rand::rng();
        let secret = loop {
            // Nearly every 32 bytes are a key of the curve; the others are drawn again.
            if let Ok(secret) = SecretKey::from_slice(&random.random::<[u8; 32]>()) {
                break secret;
            }
        };
        let pem = secret.to_pkcs8_pem(LineEnding::LF).context("the signing key cannot be encoded")?;
        let key_id = Uuid::new_v4().to_string();
        let point = secret.public_key().to_encoded_point(false);
        let coordinate = |bytes: Option<&p256::FieldBytes>| bytes.map(|bytes| URL_SAFE_NO_PAD.encode(bytes));
        let public_key = json!({
            "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "key_ops": ["verify"], "ext": true, "kid": key_id,
            "x": coordinate(point.x()), "y": coordinate(point.y()),
        });
        Ok(Self {
            publishable_key: api_key("sb_publishable_"),
            secret_key: api_key("sb_secret_"),
            issuer: format!("{}/auth/v1", origin.trim_end_matches('/')),
            signing_key: EncodingKey::from_ec_pem(pem.as_bytes())?,
            public_key,
            key_id,
            legacy_secret: random.random::<[u8; 32]>().to_vec(),
            callback_key: random.random(),
            seal_key: random.random(),
            nudge_key: format!("whsec_{}", STANDARD.encode(random.random::<[u8; 32]>())),
        })
    }

    /// The key set that clients may see: the public half of the signing key.
    pub fn public_jwks(&self) -> Value {
        json!({ "keys": [self.public_key] })
    }

    /// The key set that PostgREST verifies with: the public key, and the legacy shared secret that projects still have.
    pub fn postgrest_jwks(&self) -> Value {
        let legacy = json!({ "kty": "oct", "alg": "HS256", "k": URL_SAFE_NO_PAD.encode(&self.legacy_secret) });
        json!({ "keys": [self.public_key, legacy] })
    }

    /// Signs claims with the run's ES256 key.
    pub fn sign(&self, claims: &impl Serialize) -> Result<String> {
        let mut header = Header::new(Algorithm::ES256);
        header.kid = Some(self.key_id.clone());
        Ok(jsonwebtoken::encode(&header, claims, &self.signing_key)?)
    }

    /// The claims of a signed-in user's token; change them to make a bad one.
    pub fn user_claims(&self, user_id: Uuid, email: &str) -> Claims {
        Claims {
            sub: Some(user_id),
            aud: Some("authenticated".to_owned()),
            email: Some(email.to_owned()),
            session_id: Some(Uuid::new_v4()),
            ..self.role_claims("authenticated", USER_SECONDS)
        }
    }

    /// A signed-in user's token.
    pub fn user_jwt(&self, user_id: Uuid, email: &str) -> Result<String> {
        self.sign(&self.user_claims(user_id, email))
    }

    /// A token for a role alone, as the gateway puts in place of an API key: signed with the shared secret, which is cheap on both sides.
    pub fn role_jwt(&self, role: &str) -> Result<String> {
        let key = EncodingKey::from_secret(&self.legacy_secret);
        Ok(jsonwebtoken::encode(&Header::new(Algorithm::HS256), &self.role_claims(role, GATEWAY_SECONDS), &key)?)
    }

    fn role_claims(&self, role: &str, seconds: i64) -> Claims {
        let now = Utc::now().timestamp();
        Claims {
            iss: self.issuer.clone(),
            sub: None,
            aud: None,
            role: role.to_owned(),
            email: None,
            session_id: None,
            // A clock that is a little behind ours must not find it made in the future.
            iat: now - 5,
            exp: now + seconds,
        }
    }

    /// The key that signs the nudges of the database's webhooks, `whsec_…`.
    pub fn nudge_key(&self) -> &str {
        &self.nudge_key
    }

    /// The stack's secret as Secrets Manager keeps it.
    pub fn secret_json(&self) -> String {
        json!({
            "supabase_secret_key": self.secret_key,
            "callback_keys": [{ "id": 1, "key": STANDARD.encode(self.callback_key) }],
            "seal_keys": [{ "id": 1, "key": STANDARD.encode(self.seal_key) }],
            "nudge_keys": [self.nudge_key],
        })
        .to_string()
    }

    /// The stack's secret as the functions read it.
    pub fn secrets(&self) -> Result<Secrets> {
        Ok(serde_json::from_str(&self.secret_json())?)
    }
}

/// A key in Supabase's form: prefix, 22 random characters, a checksum of 8.
fn api_key(prefix: &str) -> String {
    let random = URL_SAFE_NO_PAD.encode(rand::rng().random::<[u8; 16]>());
    let checksum = URL_SAFE_NO_PAD.encode(Sha256::digest(random.as_bytes()));
    format!("{prefix}{random}_{}", &checksum[..8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{DecodingKey, Validation, jwk::JwkSet};

    #[test]
    fn a_user_token_verifies_with_the_published_key() {
        let keys = Keys::generate("http://127.0.0.1:1/").unwrap();
        let user = Uuid::new_v4();
        let token = keys.user_jwt(user, "a@example.com").unwrap();
        let set: JwkSet = serde_json::from_value(keys.public_jwks()).unwrap();
        let kid = jsonwebtoken::decode_header(&token).unwrap().kid.unwrap();
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_audience(&["authenticated"]);
        validation.set_issuer(&["http://127.0.0.1:1/auth/v1"]);
        let key = DecodingKey::from_jwk(set.find(&kid).unwrap()).unwrap();
        let claims = jsonwebtoken::decode::<Value>(&token, &key, &validation).unwrap().claims;
        assert_eq!(claims["sub"], user.to_string());
        assert_eq!(claims["role"], "authenticated");
    }

    #[test]
    fn the_secret_is_what_functions_read() {
        let keys = Keys::generate("http://127.0.0.1:1").unwrap();
        let secrets = keys.secrets().unwrap();
        assert_eq!(secrets.supabase_secret_key, keys.secret_key);
        assert_eq!(secrets.seal_keys[0].key.len(), 32);
    }
}
