//! What logs, errors and rows do not say: no secret anywhere, and neither a full number nor what was said in any line or error.

mod everyone;

use super::*;
use anyhow::Context;
use shared::telemetry;
use std::{
    collections::BTreeSet,
    io::Write,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tests::{agents, callbacks::recording_url, carrier::signed_callback, events::Answer, media::MediaHost};
use uuid::Uuid;

/// Log lines, as they are written.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Lines {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }
}

/// Everything that a sender or caller was told.
#[derive(Default)]
struct Told(Vec<String>);

impl Told {
    async fn send(&mut self, intake: &Intake, event: HttpEvent) -> Result<Answer> {
        let answer = event.send(intake).await?;
        self.0.push(answer.body.clone());
        Ok(answer)
    }
}

/// The texts of a delivery that somebody said or wrote, line by line.
fn said(value: &Value, words: &mut BTreeSet<String>) {
    const SPOKEN: [&str; 8] =
        ["content", "message", "text", "transcript", "summary", "call_summary", "transcript_summary", "chat"];
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                match value {
                    Value::String(text) if SPOKEN.contains(&key.as_str()) => {
                        let lines =
                            text.lines().map(|line| line.split_once(": ").map_or(line, |(_, said)| said).trim());
                        words.extend(lines.filter(|line| line.chars().count() >= 12).map(str::to_owned));
                    }
                    other => said(other, words),
                }
            }
        }
        Value::Array(items) => items.iter().for_each(|item| said(item, words)),
        _ => {}
    }
}

/// Numbers that are written in full, as E.164 or without its plus.
fn numbers(text: &str, found: &mut BTreeSet<String>) {
    let digits = |text: &str| text.bytes().take_while(u8::is_ascii_digit).count();
    for (at, _) in text.match_indices('+') {
        let length = digits(&text[at + 1..]);
        if (10..=15).contains(&length) {
            found.insert(text[at + 1..=at + length].to_owned());
        }
    }
}

/// Where any of these stands in a column of any table.
async fn rows_with(stack: &Stack, secrets: &[String]) -> Result<Vec<String>> {
    let columns = stack
        .sql
        .query(
            "select class.oid::regclass::text, attribute.attname::text
             from pg_attribute as attribute
             join pg_class as class on class.oid = attribute.attrelid
             where class.relnamespace in ('public'::regnamespace, 'private'::regnamespace) and class.relkind in ('r', 'p')
               and not class.relispartition and attribute.attnum > 0 and not attribute.attisdropped
               and format_type(attribute.atttypid, null) in ('text', 'jsonb', 'json', 'text[]')",
            &[],
        )
        .await?;
    let patterns: Vec<String> = secrets.iter().map(|secret| format!("%{secret}%")).collect();
    let mut found = Vec::new();
    for column in &columns {
        let (table, name): (String, String) = (column.get(0), column.get(1));
        let asked = format!("select count(*) from {table} where \"{name}\"::text like any ($1)");
        let count: i64 = stack.sql.query_one(&asked, &[&patterns]).await?.get(0);
        if count > 0 {
            found.push(format!("{table}.{name}: {count}"));
        }
    }
    Ok(found)
}

/// Fails where a line or an answer says any of these.
#[track_caller]
fn assert_untold(log: &str, told: &Told, hidden: &[&String]) {
    let texts =
        log.lines().map(|line| ("a log line", line)).chain(told.0.iter().map(|body| ("an answer", body.as_str())));
    let wrong: Vec<String> = texts
        .flat_map(|(what, text)| {
            hidden
                .iter()
                .filter(|hidden| text.contains(hidden.as_str()))
                .map(move |hidden| format!("{what} says {hidden}: {text}"))
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[tokio::test]
async fn no_line_error_or_row_tells_what_it_must_not() -> Result<()> {
    let lines = Lines::default();
    let into = lines.clone();
    let _captured = telemetry::capture("info", move || into.clone());
    let (stack, campaign, calls) = calls(9).await?;
    let (intake, mut told) = (stack.intake()?, Told::default());
    let secrets = stack.keys.secrets()?;
    let (mut spoken, mut people) = (BTreeSet::new(), BTreeSet::new());

    // A carrier: in order, forged, unknown, failing, and with a database that is away.
    let media = MediaHost::start().await?;
    let base = media.url.as_str().trim_end_matches('/').to_owned();
    stack.sql.execute("update public.carrier_accounts set api_base = $1", &[&base]).await?;
    for (call, name) in calls.iter().zip(["good", "page", "gone"]) {
        told.send(&intake, campaign.carrier.ring(call)?).await?;
        told.send(&intake, campaign.carrier.hangup(call, &TALKED)?).await?;
        let form = [
            ("CallUUID", "x"),
            ("RecordUrl", &*media.recording(name)),
            ("RecordingID", name),
            ("To", call.to.trim_start_matches('+')),
        ];
        let form =
            form.map(
                |(key, value)| {
                    if key == "CallUUID" { (key, call.call_uuid.to_string()) } else { (key, value.to_owned()) }
                },
            );
        let form: Vec<(&str, &str)> = form.iter().map(|(key, value)| (*key, value.as_str())).collect();
        told.send(&intake, signed_callback(&campaign.carrier.auth_token, &recording_url(call, &secrets)?, &form)?)
            .await?;
    }
    stack.recording_queue.deliver(&intake).await?;
    let to = calls[3].to.trim_start_matches('+');
    let forged = signed_callback("not the token", &calls[3].hangup_url, &[("CallUUID", "x"), ("To", to)])?;
    assert_eq!(told.send(&intake, forged).await?.status, 403);
    let half = calls[3].ring_url.split('#').next().unwrap_or_default();
    told.send(&intake, signed_callback(&campaign.carrier.auth_token, &half[..half.len() - 5], &[("To", to)])?).await?;
    let late = Create { call_uuid: Uuid::new_v4(), ..calls[0].clone() };
    assert_eq!(told.send(&intake, campaign.carrier.hangup(&late, &TALKED)?).await?.status, 202);
    stack
        .sql
        .batch_execute(
            "create function private.break() returns trigger language plpgsql as $$ begin raise 'no room for %', new.phone; end $$;
             create trigger break before update on public.leads for each row execute function private.break()",
        )
        .await?;
    let failed = told.send(&intake, campaign.carrier.hangup(&calls[3], &TALKED)?).await?;
    assert_eq!(failed.json()["result"], "failed");
    stack.sql.batch_execute("update private.webhook_events set next_try_at = now() where status = 'failed'").await?;
    told.0.push(events::job(&intake, "sweep").await?.to_string());
    stack.sql.batch_execute("drop trigger break on public.leads").await?;

    // Voice agents: all that they are known to send, and what they do not.
    let mut known = vec![campaign.carrier.auth_token.clone()];
    for provider in ["retell", "elevenlabs", "vapi", "agent"] {
        let settings = if provider == "vapi" {
            json!({ "transfer_destination": { "type": "number", "number": "+918044445555" } })
        } else {
            json!({})
        };
        let source = agents::connect(&stack, &intake, &campaign.tenant, provider, settings).await?;
        let attempt = token_of(&calls[4 + known.len() % 4], &secrets)?.attempt_id;
        for name in agents::names(provider)? {
            let body = agents::recorded(provider, &name, attempt, &format!("{provider}4"))?;
            let value: Value = serde_json::from_str(&body)?;
            said(&value, &mut spoken);
            numbers(&body, &mut people);
            // What an agent is told, as where to transfer a call, is its business; what it is refused must not quote it.
            let answer = source.deliver(&body).send(&intake).await?;
            assert!(answer.status < 300, "{provider} {name}: {} {}", answer.status, answer.body);
            let forged = agents::AgentSource { secret: "another".to_owned(), ..source.clone() };
            assert_eq!(told.send(&intake, forged.deliver(&body)).await?.status, 403, "{provider} {name}");
            told.send(&intake, source.deliver(&body.replace('{', "[{"))).await?;
        }
        known.push(source.secret.clone());
    }

    // Without a database, and without a queue.
    stack.postgrest.kill().await?;
    let mut config = stack.config.clone();
    config.queues.insert("intake".to_owned(), format!("{}-gone", stack.intake_queue.url));
    assert_eq!(told.send(&intake, campaign.carrier.hangup(&calls[8], &TALKED)?).await?.status, 202);
    assert_eq!(told.send(&stack.intake_of(config)?, campaign.carrier.ring(&calls[8])?).await?.status, 503);
    let messages = stack.intake_queue.receive().await?;
    events::invoke_within(&intake, tests::queues::batch(&messages), Duration::from_secs(2)).await?;
    stack.postgrest.restart().await?;
    tests::queues::hand_over(&intake, &messages).await?;

    // Users.
    let attempt = token_of(&calls[0], &secrets)?.attempt_id;
    let path = format!("/functions/v1/webhook-intake/calls/{attempt}/recording");
    assert_eq!(HttpEvent::post(&path).bearer(campaign.tenant.jwt()).send(&intake).await?.status, 200);
    told.send(&intake, HttpEvent::post(&path).bearer("a.b.c")).await?;
    let refused = json!({ "provider": "retell", "name": "x", "secret": "a secret that is too long ".repeat(100) });
    let sources = HttpEvent::post("/functions/v1/webhook-intake/sources").bearer(campaign.tenant.jwt());
    told.send(&intake, sources.json(&refused)?).await?.assert_error(422, "invalid_secret");
    let phone = calls[1].to.clone();
    stack.rpc(campaign.tenant.jwt(), "erase_person", &json!({ "phone": phone })).await?;
    for job in ["sweep", "retention"] {
        told.0.push(events::job(&intake, job).await?.to_string());
    }

    let log = lines.text();
    println!(
        "{} lines, {} errors and answers, {} sentences, {} numbers",
        log.lines().count(),
        told.0.len(),
        spoken.len(),
        people.len()
    );
    assert!(log.lines().count() > 20 && log.contains("a signature does not match"), "there is a log to look at: {log}");
    assert!(spoken.len() > 10 && people.len() > 2, "there is something to keep quiet about: {spoken:?} {people:?}");

    known.extend([stack.keys.secret_key.clone(), stack.keys.nudge_key().to_owned(), campaign.tenant.jwt().to_owned()]);
    known.push("a secret that is too long".to_owned());
    for call in &calls {
        numbers(&call.to, &mut people);
        numbers(&call.from, &mut people);
        // A callback's token opens its call's answer.
        for url in [&call.answer_url, &call.ring_url, &call.hangup_url] {
            let token = url.split('#').next().and_then(|url| url.rsplit('/').next()).context("a token")?;
            known.push(token.to_owned());
        }
    }
    let hidden: Vec<&String> = known.iter().chain(&people).chain(&spoken).collect();
    assert_untold(&log, &told, &hidden);
    let rows = rows_with(&stack, &known).await?;
    assert!(rows.is_empty(), "secrets are in {rows:?}");
    Ok(())
}
