//! Leases of calls that nobody tells of any more, when callbacks are lost on purpose.
//!
//! Leases run in real time, and so they should; but a call of this carrier is over in a second where a real one talks for minutes, and
//! whoever watches would wait ten minutes for each that fell silent. So the leases of calls that have not moved for a while are aged, and
//! the reconciler asks the carrier about them as it would have later.

use anyhow::{Context, Result};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};
use tokio_postgres::Client;
use uuid::Uuid;

/// After so long without a change a call is silent, and the carrier may be asked.
const SILENT: Duration = Duration::from_secs(4);
/// After so long nobody can still be at it who was to ask the carrier for it: what the carrier does not know then was never made.
const ABANDONED: Duration = Duration::from_secs(20);
/// How often it is looked.
const EVERY: Duration = Duration::from_secs(2);

const OPEN: &str = "select id, concat_ws(' ', status, call_sid) from public.call_logs where status <> 'ended'";
/// What has ended, and whose seconds the carrier is to be asked for.
const ASK: &str = "update private.unsettled_calls set due_at = now() where due_at > now()";
const AGE: &str = "update public.call_logs set lease_until = now() where id = any ($1) and status <> 'ended'";
/// By more than the ten minutes after which a call that the carrier does not know is given up.
const ABANDON: &str = "update public.call_logs set begun_at = begun_at - interval '11 minutes' \
                       where id = any ($1) and status <> 'ended' and begun_at > now() - interval '11 minutes'";

/// Open calls, and since when each is as it is.
#[derive(Debug)]
pub(super) struct Silence {
    calls: HashMap<Uuid, (String, Instant)>,
    looked: Instant,
}

impl Silence {
    pub(super) fn new() -> Self {
        Self { calls: HashMap::new(), looked: Instant::now() }
    }

    /// Ages what is silent, when it is time to look. Whether anything was: then the reconciler has something to ask.
    pub(super) async fn age(&mut self, database: &Client) -> Result<bool> {
        if self.looked.elapsed() < EVERY {
            return Ok(false);
        }
        self.looked = Instant::now();
        let open = database.query(OPEN, &[]).await.context("which calls are open")?;
        let mut before = std::mem::take(&mut self.calls);
        for row in open {
            let (id, state): (Uuid, String) = (row.get(0), row.get(1));
            let since = before.remove(&id).filter(|(known, _)| *known == state).map_or(self.looked, |(_, since)| since);
            self.calls.insert(id, (state, since));
        }
        database.execute(ASK, &[]).await.context("ageing calls without seconds")?;
        let mut aged = 0;
        for (limit, age) in [(SILENT, AGE), (ABANDONED, ABANDON)] {
            let since = |since: &Instant| self.looked.duration_since(*since);
            let calls = self.calls.iter().filter(|(_, (_, begun))| since(begun) >= limit);
            let calls: Vec<Uuid> = calls.map(|(id, _)| *id).collect();
            if !calls.is_empty() {
                aged += database.execute(age, &[&calls]).await.context("ageing leases")?;
            }
        }
        Ok(aged > 0)
    }
}
