//! The operator's switch: in the middle of the campaign all dialling is stopped, and let go on after a while.

use super::facts::Standing;
use crate::parts::progress::{Progress, Step};
use anyhow::Result;
use chrono::{DateTime, TimeDelta, Utc};
use std::time::Duration;
use tokio_postgres::Client;

/// How long nobody is called.
const STOPPED: Duration = Duration::from_secs(5);

/// Attempts whose request to the carrier may be under way: they were begun before. One that was begun long ago has nobody at it any more.
const UNDER_WAY: &str = "select exists (select from public.call_logs where status = 'submitting' and begun_at > now() - interval '20 seconds')";
const TURN: &str = "update private.platform_dialling set dialling_enabled = $1, reason = case when $1 then null else 'Asked to stop' end";

/// From when to when, in real time.
pub type Stretch = (DateTime<Utc>, DateTime<Utc>);

/// The switch, and what is told of it.
pub(super) struct Switch {
    stage: Stage,
    step: Option<Step>,
}

#[derive(Clone, Copy)]
enum Stage {
    /// It is not touched.
    Untouched,
    /// It is turned off once a third of the leads were dialled.
    ToCome,
    /// It is off, and what was begun before is still on its way.
    Falling,
    /// It is off, and nothing is on its way since then.
    Off(DateTime<Utc>),
    /// It was off in this stretch.
    Over(Stretch),
}

impl Switch {
    pub(super) fn new(wanted: bool) -> Self {
        Self { stage: if wanted { Stage::ToCome } else { Stage::Untouched }, step: None }
    }

    pub(super) fn is_off(&self) -> bool {
        matches!(self.stage, Stage::Falling | Stage::Off(_))
    }

    pub(super) fn stretch(&self) -> Option<Stretch> {
        match self.stage {
            Stage::Over(stretch) => Some(stretch),
            _ => None,
        }
    }

    /// Turns it when it is time to.
    pub(super) async fn turn(&mut self, database: &Client, standing: &Standing, progress: &Progress) -> Result<()> {
        self.stage = match self.stage {
            Stage::ToCome if standing.leads > 0 && standing.dials >= standing.leads / 3 => {
                database.execute(TURN, &[&false]).await?;
                let step = progress.step("Kill switch");
                step.say("off: nobody is called");
                self.step = Some(step);
                Stage::Falling
            }
            Stage::Falling if !database.query_one(UNDER_WAY, &[]).await?.get::<_, bool>(0) => Stage::Off(Utc::now()),
            Stage::Off(since) if Utc::now() - since > TimeDelta::from_std(STOPPED)? => {
                let until = Utc::now();
                database.execute(TURN, &[&true]).await?;
                if let Some(step) = self.step.take() {
                    step.done(format!("off for {} s in which nobody was called, and on again", STOPPED.as_secs()));
                }
                Stage::Over((since, until))
            }
            stage => stage,
        };
        Ok(())
    }
}
