//! The campaign, from its start until every lead is in a terminal state: watched, and moved on in time whenever nothing is under way.

use super::{
    cast::Cast,
    facts::{self, Standing},
    silence::Silence,
    switch::{Stretch, Switch},
};
use crate::{
    carrier::Carrier,
    parts::{
        clock::Advance,
        postgres::Role,
        progress::{Progress, Step},
    },
    stack::Stack,
};
use anyhow::{Result, bail};
use chrono::FixedOffset;
use std::time::{Duration, Instant};
use tokio_postgres::Client;
use uuid::Uuid;

/// How often the campaign is looked at.
const GLANCE: Duration = Duration::from_millis(120);
/// How often its owner's browser asks for it.
const POLL: Duration = Duration::from_secs(2);
/// After so long without any change it is told what is waited for.
const PAUSE: Duration = Duration::from_secs(10);
/// After so long without any change something is wrong: longer than the reconciler may need for a call that fell silent.
const PATIENCE: Duration = Duration::from_secs(20 * 60);
/// How long what is tried again and again may fail.
const TOLERANCE: Duration = Duration::from_secs(20);
/// How many kinds of outcome fit on a line that moves.
const SHOWN: usize = 4;
/// How long PostgREST stays away when it is killed.
const OUTAGE: Duration = Duration::from_secs(5);

/// How long what is still on its way may take to arrive.
const SETTLING: Duration = Duration::from_secs(60);
/// How long after the last call somebody else's carrier may still send something.
const OTHERS_TAIL: Duration = Duration::from_millis(1_500);

/// PostgREST's death and return.
enum Outage {
    /// Not asked for, or over.
    None,
    /// It comes when this many attempts were dialled.
    At(i64),
    /// PostgREST is away, for as long as the step has lasted.
    Now(Step),
}

/// What happens while the campaign runs.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// PostgREST is killed in the middle, for five seconds.
    pub kill_postgrest: bool,
    /// The operator stops all dialling in the middle, for a few seconds.
    pub kill_switch: bool,
    /// Calls fall silent, so that the carrier has to be asked.
    pub callbacks_are_lost: bool,
}

/// Watches until the campaign is over and nothing is under way any more. Returns from when to when dialling was stopped.
pub async fn campaign(
    stack: &Stack,
    cast: &Cast,
    campaign: Uuid,
    plan: Plan,
    progress: &Progress,
) -> Result<Option<Stretch>> {
    let mut database = None;
    let mut display = Display::new(progress);
    let mut last = Standing::default();
    let mut changed = Instant::now();
    let mut polled = Instant::now();
    let mut outage = Outage::None;
    let mut trouble = Trouble::default();
    let mut switch = Switch::new(plan.kill_switch);
    let mut silence = plan.callbacks_are_lost.then(Silence::new);
    loop {
        if let Outage::Now(step) = &outage {
            step.say(format!("killed, and back in {} s", OUTAGE.saturating_sub(step.elapsed()).as_secs() + 1));
        }
        let looked = Instant::now();
        let Some((standing, silent)) = trouble.note(look(stack, &mut database, campaign, silence.as_mut()).await)?
        else {
            // The database was stopped, and with it the connection.
            database = None;
            tokio::time::sleep(GLANCE).await;
            continue;
        };
        let looking = looked.elapsed();
        display.show(stack, &standing, changed.elapsed());
        if plan.kill_postgrest && last.leads == 0 {
            outage = Outage::At(standing.leads * 2 / 5);
        }
        if standing != last {
            changed = Instant::now();
            last = standing;
        }
        outage = weather(stack, outage, &last, progress).await?;
        if let Some(database) = &database {
            trouble.note(switch.turn(database, &last, progress).await)?;
        }
        if silent {
            // At once, not with the next tick: while a single call is open, business time stands still.
            trouble.note(stack.clock.fire("reconcile").await)?;
        }
        let calm = !matches!(outage, Outage::Now(_)) && !switch.is_off();
        if calm && polled.elapsed() >= POLL {
            polled = Instant::now();
            trouble.note(cast.browser.get(&format!("functions/v1/call-dispatch/campaigns/{campaign}")).await)?;
        }
        if calm {
            let over = last.leads > 0 && last.terminal == last.leads && last.open == 0;
            match trouble.note(stack.clock.advance_when_idle().await)? {
                Some(Advance::Nothing) if over => break,
                Some(Advance::Jumped { .. }) => changed = Instant::now(),
                _ => {}
            }
        }
        if changed.elapsed() > PATIENCE {
            bail!("nothing has moved for {} s: {}", PATIENCE.as_secs(), stuck(&last));
        }
        // Looking costs the machine something too: a tenth of its time at most.
        tokio::time::sleep(GLANCE.max(10 * looking)).await;
    }
    display.done(&last);
    Ok(switch.stretch())
}

/// How far the campaign is, and whether a call of it fell silent; through a connection that is made where there is none.
async fn look(
    stack: &Stack,
    database: &mut Option<Client>,
    campaign: Uuid,
    silence: Option<&mut Silence>,
) -> Result<(Standing, bool)> {
    let client = match database {
        Some(client) => client,
        None => database.insert(stack.connect(Role::Admin).await?),
    };
    let silent = match silence {
        Some(silence) => silence.age(client).await?,
        None => false,
    };
    Ok((facts::standing(client, campaign).await?, silent))
}

/// Failures that may pass: what is tried again anyway is given up only when it has failed for a while.
#[derive(Default)]
struct Trouble {
    since: Option<Instant>,
}

impl Trouble {
    fn note<T>(&mut self, tried: Result<T>) -> Result<Option<T>> {
        match tried {
            Ok(done) => {
                self.since = None;
                Ok(Some(done))
            }
            Err(error) if self.since.get_or_insert_with(Instant::now).elapsed() > TOLERANCE => Err(error),
            Err(error) => {
                tracing::warn!("{error:#}");
                Ok(None)
            }
        }
    }
}

/// Waits until nothing is on its way any more: a recording's callback may come after the end of the last call.
pub async fn settle(stack: &Stack, carrier: Option<&Carrier>) -> Result<()> {
    let begun = Instant::now();
    while begun.elapsed() < SETTLING {
        let quiet = carrier.is_none_or(Carrier::is_idle);
        if carrier.is_none() {
            // Of somebody else's carrier nothing is known but that it had time.
            tokio::time::sleep(OTHERS_TAIL).await;
        }
        if quiet && stack.clock.advance_when_idle().await? == Advance::Nothing {
            return Ok(());
        }
        tokio::time::sleep(GLANCE).await;
    }
    bail!("calls or messages are still under way {} s after the last lead was through", SETTLING.as_secs())
}

/// Kills PostgREST and brings it back when it is time to.
async fn weather(stack: &Stack, outage: Outage, standing: &Standing, progress: &Progress) -> Result<Outage> {
    Ok(match outage {
        Outage::At(dials) if standing.dials >= dials => {
            stack.postgrest.kill().await?;
            let step = progress.step("PostgREST");
            step.say("killed, and away for five seconds");
            Outage::Now(step)
        }
        Outage::Now(step) if step.elapsed() >= OUTAGE => {
            stack.postgrest.restart().await?;
            step.done("killed, and back");
            Outage::None
        }
        other => other,
    })
}

/// What a campaign waits for that does not move.
fn stuck(standing: &Standing) -> String {
    let waiting: Vec<_> = standing.waiting.iter().map(|(reason, leads)| format!("{leads} leads {reason}")).collect();
    format!(
        "{} of {} leads are in a terminal state, {} calls are open, the campaign is {}, waiting: {}",
        standing.terminal,
        standing.leads,
        standing.open,
        standing.status,
        if waiting.is_empty() { "nobody".to_owned() } else { waiting.join(", ") }
    )
}

/// Two moving lines: how many leads are through, and how their calls ended.
struct Display {
    leads: Step,
    outcomes: Step,
    length: i64,
}

impl Display {
    fn new(progress: &Progress) -> Self {
        Self { leads: progress.step("Campaign"), outcomes: progress.step("Calls"), length: 0 }
    }

    fn show(&mut self, stack: &Stack, standing: &Standing, unchanged: Duration) {
        if self.length != standing.leads {
            self.length = standing.leads;
            self.leads.set_length(standing.leads.unsigned_abs());
        }
        self.leads.set_position(standing.terminal.unsigned_abs());
        let kolkata = FixedOffset::east_opt(19_800).map_or_else(String::new, |zone| {
            stack.clock.business_now().with_timezone(&zone).format("%a %-d %b %H:%M").to_string()
        });
        self.leads.say(format!("leads   {kolkata}"));
        let waits = match standing.open {
            _ if unchanged < PAUSE => String::new(),
            0 => format!("; unchanged for {} s", unchanged.as_secs()),
            open => format!("; {open} silent for {} s, the carrier will be asked", unchanged.as_secs()),
        };
        self.outcomes.say(summary(standing, SHOWN) + &waits);
    }

    fn done(self, standing: &Standing) {
        self.leads.done(format!("{} of {} leads in a terminal state", standing.terminal, standing.leads));
        self.outcomes.done(summary(standing, usize::MAX));
    }
}

/// Calls, and the commonest ways in which they ended; the rest in one number.
fn summary(standing: &Standing, shown: usize) -> String {
    let mut outcomes: Vec<_> = standing.outcomes.iter().collect();
    outcomes.sort_by(|one, other| other.1.cmp(one.1));
    let rest: i64 = outcomes.iter().skip(shown).map(|(_, count)| **count).sum();
    let mut parts: Vec<_> = outcomes
        .into_iter()
        .take(shown)
        .map(|(outcome, count)| format!("{count} {}", outcome.replace('_', " ")))
        .collect();
    if rest > 0 {
        parts.push(format!("{rest} other"));
    }
    let live = if standing.open > 0 { format!(" ({} live)", standing.open) } else { String::new() };
    let colon = if parts.is_empty() { "" } else { ": " };
    format!("{}{live}{colon}{}", standing.dials, parts.join(", "))
}
