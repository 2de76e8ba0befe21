//! Carrier accounts and their secrets: looked up once in five minutes, so that an event costs one request and not two.

use serde::Deserialize;
use serde_json::json;
use shared::{Result, supabase::Supabase};
use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::Mutex;
use uuid::Uuid;

const MAX_AGE: Duration = Duration::from_secs(300);

/// What `open_source` says of a carrier account.
#[derive(Debug, Deserialize)]
pub struct Account {
    /// Whether there is such an account.
    pub found: bool,
    /// The carrier's name, as `plivo`.
    #[serde(default)]
    pub provider: String,
    /// Its auth token, sealed for the account's id.
    #[serde(default)]
    pub auth_token_sealed: String,
}

/// The cache.
#[derive(Default)]
pub struct Accounts {
    known: Mutex<HashMap<Uuid, (Instant, Arc<Account>)>>,
}

impl Accounts {
    /// The account, from the cache or by one request that may take `limit`. An account that is not there is remembered too: a
    /// callback for a deleted account must not cost a look-up each.
    pub async fn get(&self, supabase: &Supabase, id: Uuid, limit: Duration) -> Result<Arc<Account>> {
        if let Some((at, account)) = self.known.lock().await.get(&id)
            && at.elapsed() < MAX_AGE
        {
            return Ok(account.clone());
        }
        let request = json!({ "v": 1, "source_id": id });
        let account: Arc<Account> = Arc::new(supabase.call_within("open_source", &request, limit).await?);
        self.known.lock().await.insert(id, (Instant::now(), account.clone()));
        Ok(account)
    }

    /// Forgets an account, so that the next event sees its new secret: a signature that does not match may mean a rotated token.
    pub async fn forget(&self, id: Uuid) -> bool {
        let mut known = self.known.lock().await;
        // Not more than once in a while, or anyone could make every event cost two requests.
        match known.get(&id) {
            Some((at, _)) if at.elapsed() > Duration::from_secs(15) => known.remove(&id).is_some(),
            _ => false,
        }
    }
}
