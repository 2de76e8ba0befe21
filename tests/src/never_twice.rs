//! Whether anybody is called twice: the demo's campaign under severe faults, with `call-dispatch` killed again and again on top, judged by
//! the carrier's own log, callee by callee.

use anyhow::{Context, Result, ensure};
use chrono::{DateTime, TimeDelta, Utc};
use local::{
    parts::{postgres::Role, progress::Progress},
    stack::{Stack, StackOptions},
    story::{self, Provider, Severity, StoryOptions},
};
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde::Deserialize;
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    time::{Duration, Instant},
};
use uuid::Uuid;

/// Of so many leads so many attempts are made, about.
const ATTEMPTS_PER_LEAD: f64 = 1.4;
/// What the law of the platform says: so long from one create to the next, and so many in a day.
const GAP: TimeDelta = TimeDelta::minutes(60);
const DAY: TimeDelta = TimeDelta::hours(24);
const DAILY: usize = 2;
/// Between two kills of `call-dispatch`, in milliseconds.
const PAUSE: std::ops::Range<u64> = 400..2_400;
const WORKERS: usize = 16;
/// A call of the simulated carrier is over in a fifth of a second, so that two cores never have many at once. The first ones last, for each
/// place that there is as many: what falls silent is found out and replaced while the others still talk.
const LONG_CALLS_PER_PLACE: usize = 3;

/// A line of the carrier's log.
#[derive(Debug, Deserialize)]
struct Line {
    event: String,
    #[serde(default)]
    call_uuid: Uuid,
    #[serde(default)]
    to: Option<String>,
    at: Option<DateTime<Utc>>,
    live_to: Option<DateTime<Utc>>,
}

/// A call in it.
#[derive(Debug, Clone, Copy)]
struct Call {
    created: DateTime<Utc>,
    ended: Option<DateTime<Utc>>,
}

/// Plays it with at least so many attempts and so many calls at once; tells what came of it, and fails unless nobody was called twice,
/// every row is terminal, and the limit was reached and never passed.
pub async fn play(attempts: usize, live_calls: i32, seed: u64) -> Result<()> {
    let started = Instant::now();
    let progress = Progress::visible();
    let options = StoryOptions {
        seed,
        leads: (attempts as f64 / ATTEMPTS_PER_LEAD).ceil() as usize,
        live_calls: Some(live_calls),
        kill_postgrest: false,
        faults: Some(Severity::Severe),
        kill_switch: false,
        provider: Provider::Plivo,
        carrier_url: None,
        carrier_account: None,
        long_calls: LONG_CALLS_PER_PLACE * live_calls.unsigned_abs() as usize,
    };
    let stack = StackOptions {
        workers: WORKERS,
        speed: 20.0,
        log_level: "warn".to_owned(),
        progress: progress.clone(),
        ..options.stack()
    };
    let stack = Stack::start(stack).await?;
    let mut kills = 0;
    let played = tokio::select! {
        played = story::play(&stack, &options, &progress, started) => played?,
        failed = keep_killing(&stack, seed, &mut kills) => return failed,
    };
    print!("{}", story::render(&played.report, false));
    let numbers = &played.report.numbers;
    let calls = read(&stack.log_dir.join("carrier.jsonl"))?;
    let wrong = judge(&calls, |real| stack.clock.to_business(real));
    let left = left(&stack).await?;
    let most = played.carrier.as_ref().map_or(0, |carrier| carrier.most_live_calls());
    println!(
        "\n  {} creates to {} callees, {} attempts lost; call-dispatch killed {kills} times more; at most {most} of {live_calls} calls at once; {left}; {} s",
        numbers.carrier_creates,
        calls.len(),
        numbers.lost,
        started.elapsed().as_secs()
    );
    if let Some(carrier) = played.carrier {
        carrier.stop().await;
    }
    let holds = played.report.holds();
    stack.stop().await?;
    ensure!(wrong.is_empty(), "called twice: {}", wrong.join("; "));
    ensure!(
        calls.values().map(Vec::len).sum::<usize>() >= attempts,
        "fewer than {attempts} attempts reached the carrier"
    );
    ensure!(most == live_calls as usize, "{most} calls at once, where {live_calls} were allowed");
    ensure!(left == NOTHING_LEFT, "{left}");
    ensure!(holds, "a check of the table fails");
    Ok(())
}

/// Kills for as long as it is polled, once the campaign runs: who clicks on start would click again.
async fn keep_killing(stack: &Stack, seed: u64, kills: &mut u64) -> Result<()> {
    let database = stack.connect(Role::Admin).await?;
    let is_running = "select exists (select from public.campaigns where status = 'running')";
    while !database.query_one(is_running, &[]).await?.get::<_, bool>(0) {
        tokio::time::sleep(Duration::from_millis(PAUSE.start)).await;
    }
    drop(database);
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        tokio::time::sleep(Duration::from_millis(rng.random_range(PAUSE))).await;
        *kills += u64::from(stack.functions.kill_one("call-dispatch", rng.random_range(0..WORKERS)));
    }
}

/// The calls of the carrier's log, by callee, in order.
fn read(log: &Path) -> Result<BTreeMap<String, Vec<Call>>> {
    let text = fs::read_to_string(log).with_context(|| format!("the carrier's log {}", log.display()))?;
    let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Line>, _>>()?;
    let ends: BTreeMap<Uuid, Option<DateTime<Utc>>> =
        lines.iter().filter(|line| line.event == "end").map(|line| (line.call_uuid, line.live_to)).collect();
    let mut calls: BTreeMap<String, Vec<Call>> = BTreeMap::new();
    for line in lines.into_iter().filter(|line| line.event == "create") {
        let created = line.at.context("a create without a time")?;
        let ended = ends.get(&line.call_uuid).copied().flatten();
        calls.entry(line.to.context("a create without a callee")?).or_default().push(Call { created, ended });
    }
    calls.values_mut().for_each(|calls| calls.sort_by_key(|call| call.created));
    Ok(calls)
}

/// Creates that should not have been. `business` tells the business time of an instant.
fn judge(calls: &BTreeMap<String, Vec<Call>>, business: impl Fn(DateTime<Utc>) -> DateTime<Utc>) -> Vec<String> {
    let mut wrong = Vec::new();
    for (callee, calls) in calls {
        for (index, call) in calls.iter().enumerate() {
            let earlier = &calls[..index];
            let since = |other: &Call| business(call.created) - business(other.created);
            let complaint = if earlier.iter().any(|other| other.ended.is_none_or(|ended| ended > call.created)) {
                "while another call was live"
            } else if earlier.iter().any(|other| since(other) < GAP) {
                "within the gap"
            } else if earlier.iter().filter(|other| since(other) < DAY).count() >= DAILY {
                "too often in a day"
            } else {
                continue;
            };
            // A number is not printed in full.
            wrong.push(format!("…{} {complaint}", &callee[callee.len().saturating_sub(4)..]));
        }
    }
    wrong
}

const NOTHING_LEFT: &str = "0 rows open, 0 waiting, 0 holds, 0 dialled inside the gap";

/// What is not over in the database; and attempts that were begun inside the gap, whether the carrier heard of them or not.
async fn left(stack: &Stack) -> Result<String> {
    let row = stack
        .connect(Role::Admin)
        .await?
        .query_one(
            "select format('%s rows open, %s waiting, %s holds, %s dialled inside the gap',
               (select count(*) from public.call_logs where status <> 'ended'),
               (select count(*) from public.call_queue where status in ('queued', 'processing')),
               (select count(*) from private.call_holds),
               (select count(*) from (
                 select submitted_at - lag(submitted_at) over (partition by callee_number order by submitted_at) as gap
                 from public.call_logs where dialled
               ) as dial where gap < interval '60 minutes'))",
            &[],
        )
        .await?;
    Ok(row.get(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_creates_too_close_or_too_many_are_told() {
        let at = |minutes: i64| DateTime::UNIX_EPOCH + TimeDelta::minutes(minutes);
        let call = |from: i64, to: Option<i64>| Call { created: at(from), ended: to.map(at) };
        let told = |calls: &[Call]| judge(&BTreeMap::from([("919800000001".to_owned(), calls.to_vec())]), |real| real);
        assert!(told(&[call(0, Some(1)), call(60, Some(61)), call(1_441, Some(1_442))]).is_empty());
        assert_eq!(told(&[call(0, Some(1)), call(59, Some(60))]), ["…0001 within the gap"]);
        assert_eq!(told(&[call(0, None), call(90, Some(91))]), ["…0001 while another call was live"]);
        assert_eq!(told(&[call(0, Some(1)), call(90, Some(91)), call(180, Some(181))]), ["…0001 too often in a day"]);
    }
}
