//! Sources and their secrets: looked up once in five minutes, so that an event costs one request and not two.

use crate::sources::OpenSource;
use serde::Deserialize;
use serde_json::{Value, json};
use shared::{Error, Result, seal::Sealer, secrets::Secrets, supabase::Supabase};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;
use uuid::Uuid;

const MAX_AGE: Duration = Duration::from_secs(300);
/// How many are remembered: ids that name nothing are a stranger's to invent.
const MOST: usize = 4096;

/// What `open_source` says.
#[derive(Deserialize)]
struct Answer {
    found: bool,
    #[serde(default)]
    provider: String,
    #[serde(default)]
    organization_id: Option<Uuid>,
    #[serde(default)]
    store_id: Option<Uuid>,
    #[serde(default)]
    settings: Value,
    #[serde(default)]
    secrets_sealed: Vec<String>,
    #[serde(default)]
    previous_until: Option<i64>,
}

/// A source as it is remembered.
struct Known {
    /// With its newest secret alone.
    source: OpenSource,
    /// The one before, and the unix second until which it holds.
    previous: Option<(String, i64)>,
}

/// What was learnt, and when: also that there is no such source.
type Learnt = (Instant, Option<Arc<Known>>);

/// The cache.
#[derive(Default)]
pub struct Accounts {
    known: Mutex<HashMap<Uuid, Learnt>>,
}

impl Accounts {
    /// The source, from the cache or by one request that may take `limit`; `None` where there is none. That is remembered too: an event
    /// for a source that was deleted must not cost a look-up each.
    pub async fn get(
        &self,
        supabase: &Supabase,
        secrets: &Secrets,
        id: Uuid,
        limit: Duration,
    ) -> Result<Option<OpenSource>> {
        let cached = match self.known.lock().await.get(&id) {
            Some((at, known)) if at.elapsed() < MAX_AGE => Some(known.clone()),
            _ => None,
        };
        let known = match cached {
            Some(known) => known,
            None => {
                let answer: Answer =
                    supabase.call_within("open_source", &json!({ "v": 1, "source_id": id }), limit).await?;
                let opened = opened(id, answer, secrets)?.map(Arc::new);
                let mut known = self.known.lock().await;
                if known.len() >= MOST {
                    known.clear();
                }
                known.insert(id, (Instant::now(), opened.clone()));
                opened
            }
        };
        Ok(known.map(|known| known.at(chrono::Utc::now().timestamp())))
    }

    /// Forgets a source, so that the next look sees its new secret: a signature that does not match may mean a rotated one.
    pub async fn forget(&self, id: Uuid) -> bool {
        let mut known = self.known.lock().await;
        // Not more than once in a while, or anyone could make every event cost two requests.
        match known.get(&id) {
            Some((at, _)) if at.elapsed() > Duration::from_secs(15) => known.remove(&id).is_some(),
            _ => false,
        }
    }
}

impl Known {
    /// The source with the secrets that are valid at `now` in unix seconds.
    fn at(&self, now: i64) -> OpenSource {
        let mut source = self.source.clone();
        source.secrets.extend(self.previous.iter().filter(|(_, until)| now < *until).map(|(secret, _)| secret.clone()));
        source
    }
}

/// Opens what is sealed. A secret that does not open is left out; when none is left, the source cannot be verified now.
fn opened(id: Uuid, answer: Answer, secrets: &Secrets) -> Result<Option<Known>> {
    if !answer.found {
        return Ok(None);
    }
    let sealer = Sealer::new(&secrets.seal_keys)?;
    let open = |sealed: &String| match sealer.open(sealed, &id.to_string()) {
        Ok(secret) => Some(secret),
        Err(error) => {
            tracing::error!(source_id = %id, error = %error, "a source's secret cannot be opened");
            None
        }
    };
    let newest: Vec<String> = answer.secrets_sealed.first().and_then(open).into_iter().collect();
    let previous = answer.secrets_sealed.get(1).and_then(open).zip(answer.previous_until);
    if newest.is_empty() && previous.is_none() {
        return Err(Error::unavailable("none of the source's secrets can be opened"));
    }
    Ok(Some(Known {
        source: OpenSource {
            id,
            provider: answer.provider,
            organization_id: answer.organization_id,
            store_id: answer.store_id,
            settings: answer.settings,
            secrets: newest,
        },
        previous,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use shared::secrets::NumberedKey;

    fn secrets(key: u8) -> Secrets {
        Secrets {
            supabase_secret_key: String::new(),
            callback_keys: vec![],
            seal_keys: vec![NumberedKey { id: 1, key: vec![key; 32] }],
            nudge_keys: vec![],
        }
    }

    fn answer(id: Uuid) -> Answer {
        let sealer = Sealer::new(&secrets(1).seal_keys).unwrap();
        let sealed = ["new", "old"].map(|secret| sealer.seal(secret, &id.to_string()).unwrap());
        serde_json::from_value(
            json!({ "found": true, "provider": "p", "secrets_sealed": sealed, "previous_until": 100 }),
        )
        .unwrap()
    }

    #[test]
    fn the_secret_before_holds_until_its_time() {
        let id = Uuid::new_v4();
        let known = opened(id, answer(id), &secrets(1)).unwrap().unwrap();
        assert_eq!(known.at(99).secrets, ["new", "old"]);
        assert_eq!(known.at(100).secrets, ["new"]);
    }

    #[test]
    fn a_source_whose_secrets_do_not_open_is_not_one_without_secrets() {
        let id = Uuid::new_v4();
        for (answer, secrets) in [(answer(Uuid::new_v4()), secrets(1)), (answer(id), secrets(2))] {
            assert!(opened(id, answer, &secrets).err().is_some_and(|error| error.is_retryable()));
        }
    }
}
