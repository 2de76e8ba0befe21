//! Voice agents: every recorded delivery changes the row that it is about, in whatever order deliveries come.

use super::*;
use anyhow::{Context, ensure};
use tests::agents::{self, AgentSource, recorded};
use uuid::Uuid;

pub(super) struct Scene {
    pub(super) stack: Stack,
    pub(super) campaign: Campaign,
    pub(super) calls: Vec<Create>,
    pub(super) intake: Intake,
    sources: Vec<AgentSource>,
}

impl Scene {
    pub(super) async fn set(count: u32) -> Result<Self> {
        let (stack, campaign, calls) = calls(count).await?;
        let intake = stack.intake()?;
        let mut sources = Vec::new();
        for provider in ["retell", "elevenlabs", "vapi", "agent"] {
            let settings = if provider == "vapi" {
                json!({ "transfer_destination": { "type": "number", "number": "+918044445555" } })
            } else {
                json!({})
            };
            sources.push(agents::connect(&stack, &intake, &campaign.tenant, provider, settings).await?);
        }
        Ok(Self { stack, campaign, calls, intake, sources })
    }

    pub(super) fn source(&self, provider: &str) -> &AgentSource {
        self.sources.iter().find(|source| source.provider == provider).unwrap_or(&self.sources[0])
    }

    pub(super) fn attempt(&self, index: usize) -> Result<Uuid> {
        Ok(token_of(&self.calls[index], &self.stack.keys.secrets()?)?.attempt_id)
    }

    /// Delivers a recording about the call of this index; what became of it.
    pub(super) async fn tell(&self, provider: &str, name: &str, index: usize) -> Result<Value> {
        let body = recorded(provider, name, self.attempt(index)?, &format!("{provider}{index}"))?;
        let answer = self.source(provider).deliver(&body).send(&self.intake).await?;
        ensure!(answer.status == 200 || answer.status == 202, "{provider} {name}: {} {}", answer.status, answer.body);
        Ok(answer.json())
    }

    pub(super) async fn asked(&self, index: usize, sql: &str) -> Result<String> {
        let sql = sql.replace("$ATTEMPT", &format!("'{}'", self.attempt(index)?));
        self.stack.value(&sql).await.with_context(|| sql)
    }
}

/// A provider's delivery, what to ask the database, and what it answers.
type Expected = (&'static str, &'static str, &'static str, &'static str);

const LOG: &str = "from public.call_logs where id = $ATTEMPT";
const COST: &str = "(select cost.amount_micros || ' ' || cost.currency from private.call_costs as cost where cost.call_log_id = call_logs.id and cost.kind = 'agent')";
const LAST_ACTIVITY: &str = "from public.lead_activities as a join public.call_logs as l on l.lead_id = a.lead_id where l.id = $ATTEMPT and a.type <> 'call'";

#[rustfmt::skip]
const EXPECTED: &[Expected] = &[
    ("retell", "call_started", "select agent_call_id || ' ' || (metadata #>> '{agent,provider}') || ' ' || (metadata #>> '{agent,started_at}') LOG", "call_retell0 retell 2026-11-24T04:31:40+00:00"),
    ("retell", "transcript_updated", "select conversation_transcript LOG", "Agent: नमस्ते, this is Asha from Acme Homes.\nUser: Yes, tell me about the flats.\n"),
    ("retell", "transfer_started", "select type || ' ' || (content ->> 'tool') || ' ' || (content #>> '{arguments,destination}') ACTIVITY", "agent_tool transfer_started +918044445555"),
    ("retell", "transfer_bridged", "select transferred || ' ' || transfer_department || ' ' || (select transferred_calls from public.campaigns) LOG", "true +918044445555 1"),
    ("retell", "transfer_cancelled", "select content ->> 'tool' ACTIVITY", "transfer_cancelled"),
    ("retell", "transfer_ended", "select content ->> 'tool' ACTIVITY", "transfer_ended"),
    ("retell", "call_ended", "select disconnect_reason || ' ' || disconnect_notes || ' ' || recording_url || ' ' || (metadata #>> '{agent,duration_seconds}') || ' ' || COST LOG", "customer_ended user_hangup https://dxc03zgurdly9.cloudfront.net/retell6/recording.wav 37 75000 USD"),
    ("retell", "call_analyzed", "select summary || ' ' || sentiment_score || ' ' || interest_level || ' ' || (ai_analysis #>> '{custom_analysis_data,budget}') LOG", "Ravi asked about the flats and booked a visit to Tower B. 1.00 high 85 lakh"),
    ("retell", "function", "select do_not_call || ' ' || status || ' ' || opt_out_reason || ' ' || (select source from public.suppressions where phone_number = leads.phone) from public.leads where id = (select lead_id LOG)", "true do_not_call moved abroad call"),
    ("elevenlabs", "post_call_transcription", "select summary || ' ' || sentiment_score || ' ' || interest_level || ' ' || (metadata #>> '{agent,language}') || ' ' || disconnect_reason || ' ' || COST LOG", "They want to be called on Thursday evening. 0.40 medium hi agent_ended 296000000 XEL"),
    ("elevenlabs", "post_call_audio", "select (select copy.state || ' ' || copy.bytes || ' ' || copy.content_type || ' ' || (copy.path = recording_url) from private.recordings as copy where copy.attempt_id = call_logs.id) LOG", "copied 45 audio/mpeg true"),
    ("elevenlabs", "unredacted_audio", "select (select copy.state || ' ' || copy.bytes || ' ' || copy.content_type || ' ' || (copy.path = recording_url) from private.recordings as copy where copy.attempt_id = call_logs.id) LOG", "copied 45 audio/mpeg true"),
    ("elevenlabs", "unredacted_transcript", "select summary || ' ' || sentiment_score || ' ' || interest_level || ' ' || (metadata #>> '{agent,language}') || ' ' || disconnect_reason || ' ' || COST LOG", "They want to be called on Thursday evening. 0.40 medium hi agent_ended 296000000 XEL"),
    ("elevenlabs", "call_initiation_failure", "select disconnect_reason || ' ' || disconnect_notes LOG", "busy busy"),
    ("elevenlabs", "answering_machine_detection", "select (content ->> 'tool') || ' ' || (content #>> '{arguments,result}') ACTIVITY", "answering_machine_detection machine"),
    ("vapi", "status-update", "select agent_call_id || ' ' || (metadata #>> '{agent,started_at}') LOG", "vapi15 2026-11-24T04:31:40+00:00"),
    ("vapi", "status-update-ringing", "select content #>> '{arguments,status}' ACTIVITY", "ringing"),
    ("vapi", "status-update-ended", "select disconnect_reason || ' ' || disconnect_notes LOG", "customer_ended customer-ended-call"),
    ("vapi", "transcript", "select conversation_transcript LOG", "Customer: Please transfer me to sales."),
    ("vapi", "conversation-update", "select metadata #>> '{agent,message_count}' LOG", "2"),
    ("vapi", "tool-calls", "select string_agg(type || ':' || (content ->> 'tool'), ' ' order by type) ACTIVITY", "agent_tool:get_price opt_out:opt_out"),
    ("vapi", "hang", "select content ->> 'tool' ACTIVITY", "hang"),
    ("vapi", "transfer-destination-request", "select content ->> 'tool' ACTIVITY", "transfer-destination-request"),
    ("vapi", "transfer-update", "select transferred || ' ' || transfer_department LOG", "true +918044445555"),
    ("vapi", "language-change-detected", "select metadata #>> '{agent,language}' LOG", "hi"),
    ("vapi", "phone-call-control", "select content #>> '{arguments,request}' ACTIVITY", "hang-up"),
    ("vapi", "assistant-request", "select content ->> 'tool' ACTIVITY", "assistant-request"),
    ("vapi", "end-of-call-report", "select summary || ' ' || sentiment_score || ' ' || interest_level || ' ' || disconnect_reason || ' ' || recording_url || ' ' || (metadata #>> '{agent,duration_seconds}') || ' ' || COST LOG", "Ravi was put through to sales. 0.80 hot transferred https://storage.vapi.ai/vapi27-mono.wav 51 120000 USD"),
    ("agent", "started", "select metadata #>> '{agent,language}' LOG", "en"),
    ("agent", "status", "select metadata #>> '{agent,message_count}' LOG", "1"),
    ("agent", "tool", "select type || ' ' || (content #>> '{arguments,property}') ACTIVITY", "site_visit Tower A"),
    ("agent", "ended", "select disconnect_reason || ' ' || disconnect_notes || ' ' || conversation_transcript LOG", "silence idle Agent: Hello?\nCustomer: Yes."),
    ("agent", "analyzed", "select summary || ' ' || sentiment_score || ' ' || interest_level || ' ' || (ai_analysis #>> '{topics,0}') || ' ' || COST LOG", "Short and friendly. 0.25 warm price 50000 EUR"),
];

#[tokio::test]
async fn every_recorded_delivery_changes_its_row_by_value() -> Result<()> {
    let scene = Scene::set(EXPECTED.len().try_into()?).await?;
    for (index, (provider, name, asked, answer)) in EXPECTED.iter().enumerate() {
        if matches!(
            *name,
            "post_call_audio" | "unredacted_audio" | "call_initiation_failure" | "answering_machine_detection"
        ) {
            // These name no attempt: the conversation or the carrier's call is what they are known by.
            let bound = format!(
                "update public.call_logs set agent_call_id = 'conv_elevenlabs{index}' where id = $ATTEMPT returning 'bound'"
            );
            assert_eq!(scene.asked(index, &bound).await?, "bound");
        }
        let told = scene.tell(provider, name, index).await?;
        let replied = ["function", "tool-calls", "transfer-destination-request", "assistant-request"].contains(name);
        assert_eq!(
            told["result"],
            if replied && *name != "function" {
                json!(null)
            } else if replied {
                json!("noted")
            } else {
                json!("applied")
            },
            "{provider} {name}: {told}"
        );
        let sql = asked.replace("COST", COST).replace("LOG", LOG).replace("ACTIVITY", LAST_ACTIVITY);
        assert_eq!(scene.asked(index, &sql).await?, *answer, "{provider} {name}");
    }
    for provider in ["retell", "elevenlabs", "vapi", "agent"] {
        for name in agents::names(provider)? {
            let is_tested = EXPECTED.iter().any(|expected| (expected.0, expected.1) == (provider, &name));
            assert!(is_tested || name == "speech-update", "nobody asks what {provider} {name} changes");
        }
    }
    assert_eq!(scene.stack.value("select count(*) from private.webhook_events where status <> 'applied'").await?, "0");
    Ok(())
}

#[tokio::test]
async fn vapi_reads_its_answers() -> Result<()> {
    let scene = Scene::set(1).await?;
    assert_eq!(
        scene.tell("vapi", "tool-calls", 0).await?,
        json!({ "results": [
            { "toolCallId": "call_oo", "name": "opt_out", "result": "noted" },
            { "toolCallId": "call_w", "name": "get_price", "result": "noted" },
        ] })
    );
    let destination = json!({ "destination": { "type": "number", "number": "+918044445555" } });
    assert_eq!(scene.tell("vapi", "transfer-destination-request", 0).await?, destination);
    assert_eq!(scene.tell("vapi", "speech-update", 0).await?["result"], "ignored");

    // A number that may not be called is nobody's to be handed to either.
    let premium = r#"{"transfer_destination": {"type": "number", "number": "+19005550100"}}"#;
    let configure =
        format!("update public.webhook_sources set settings = settings || '{premium}' where provider = 'vapi'");
    scene.stack.sql.batch_execute(&configure).await?;
    let body = recorded("vapi", "transfer-destination-request", scene.attempt(0)?, "vapi0")?;
    let answer = scene.source("vapi").deliver(&body).send(&scene.stack.intake()?).await?;
    assert_eq!(answer.json(), json!({ "error": "the destination is refused: destination_blocked" }));
    Ok(())
}

/// What an agent's events decide, without times.
async fn settled(scene: &Scene, index: usize) -> Result<Value> {
    let text = scene
        .asked(
            index,
            "select jsonb_build_object(
               'log', (to_jsonb(l) || jsonb_build_object('recording_url', regexp_replace(l.recording_url, '^[0-9a-f-]{36}/[0-9a-f-]{36}', 'object'))) - array['id', 'lead_id', 'queue_id', 'callee_number', 'caller_number', 'call_sid', 'created_at',
                 'submitted_at', 'transferred_at', 'updated_at', 'begun_at', 'not_after', 'lease_until', 'lease_token'],
               'transferred_at', l.transferred_at is not null,
               'recording', (select jsonb_build_array(copy.state, copy.bytes, copy.path = l.recording_url) from private.recordings as copy where copy.attempt_id = l.id and copy.url is null),
               'activities', (select jsonb_agg(to_jsonb(a) - array['id', 'lead_id', 'created_at'] || jsonb_build_object('content', a.content - 'call_id') order by a.type, a.content::text)
                 from public.lead_activities as a where a.lead_id = l.lead_id),
               'lead', (select jsonb_build_object('do_not_call', x.do_not_call, 'status', x.status, 'callback', x.callback_time is not null) from public.leads as x where x.id = l.lead_id),
               'conversation', (select to_jsonb(c) - array['id', 'conversation_key', 'customer_identifier', 'start_time', 'end_time', 'last_activity_at', 'created_at', 'updated_at', 'resolution_time_seconds']
                 from public.calls as k join public.conversations as c on c.id = k.conversation_id where k.call_log_id = l.id),
               'messages', (select jsonb_agg(jsonb_build_array(m.message_index, m.role, m.content) order by m.message_index)
                 from public.calls as k join public.conversation_messages as m on m.conversation_id = k.conversation_id where k.call_log_id = l.id)
             ) from public.call_logs as l where l.id = $ATTEMPT",
        )
        .await?;
    Ok(serde_json::from_str(&text)?)
}

/// Gives every call a store's view, so that conversations follow.
async fn open_store(scene: &Scene) -> Result<()> {
    let tenant = scene.campaign.tenant.id;
    scene
        .stack
        .sql
        .batch_execute(&format!(
            "with shop as (
               insert into public.stores (organization_id, name, domain, platform) values ('{tenant}', 'Shop', 'shop.example.com', 'custom')
               returning id
             )
             insert into public.calls (organization_id, store_id, call_log_id, from_phone, to_phone, direction, start_time)
             select l.organization_id, shop.id, l.id, 'anonymous', 'anonymous', 'outbound', now() from public.call_logs as l, shop"
        ))
        .await?;
    Ok(())
}

async fn assert_order_does_not_matter(provider: &'static str, names: &[&'static str]) -> Result<Value> {
    let orders = orders(names.len());
    let scene = Scene::set(orders.len().try_into()?).await?;
    open_store(&scene).await?;
    let mut ends = Vec::new();
    for (index, order) in orders.iter().enumerate() {
        // Each comes again, after later ones.
        for step in (0..order.len()).flat_map(|step| [step, step.saturating_sub(1)]) {
            let told = scene.tell(provider, names[order[step]], index).await?;
            assert!(told["result"] != "failed", "{told}");
        }
        ends.push(settled(&scene, index).await?);
    }
    for (index, (order, end)) in orders.iter().zip(&ends).enumerate() {
        let same = |end: &Value, index: usize| end.to_string().replace(&format!("{provider}{index}"), provider);
        assert_eq!(same(end, index), same(&ends[0], 0), "order {order:?} of {names:?}");
    }
    let stuck = scene.stack.value("select string_agg(kind || ' ' || status || ' ' || coalesce(error, ''), ', ') from private.webhook_events where status not in ('applied', 'ignored')").await?;
    assert_eq!(stuck, "", "some are not applied");
    Ok(ends.remove(0))
}

#[tokio::test]
async fn retell_s_events_in_any_order_end_in_the_same_rows() -> Result<()> {
    let names = ["call_started", "transcript_updated", "call_ended", "call_analyzed"];
    let end = assert_order_does_not_matter("retell", &names).await?;
    assert_eq!(end["messages"][2], json!([2, "ai_assistant", "Booked for Saturday at eleven."]), "{end:#}");
    assert_eq!(end["conversation"]["status"], "completed");
    assert_eq!(end["conversation"]["sentiment_score"], json!(1.0));
    assert_eq!(end["log"]["disconnect_reason"], "customer_ended");
    assert!(
        end["activities"].as_array().is_some_and(|lines| lines.iter().any(|line| line["type"] == "site_visit")),
        "{end:#}"
    );
    Ok(())
}

#[tokio::test]
async fn elevenlabs_events_in_any_order_end_in_the_same_rows() -> Result<()> {
    // The audio is known by its conversation alone, which the transcription ties to the attempt.
    let end = assert_order_does_not_matter(
        "elevenlabs",
        &["post_call_audio", "post_call_transcription", "answering_machine_detection"],
    )
    .await?;
    assert_eq!(end["lead"]["callback"], true);
    assert_eq!(end["recording"], json!(["copied", 45, true]));
    assert_eq!(end["messages"].as_array().map(Vec::len), Some(3));
    Ok(())
}

#[tokio::test]
async fn vapi_s_events_in_any_order_end_in_the_same_rows() -> Result<()> {
    let names = ["status-update", "transcript", "transfer-update", "end-of-call-report"];
    let end = assert_order_does_not_matter("vapi", &names).await?;
    assert_eq!(end["log"]["transferred"], true);
    assert_eq!(end["conversation"]["escalated_to_human"], true);
    Ok(())
}

#[tokio::test]
async fn an_agent_s_own_events_in_any_order_end_in_the_same_rows() -> Result<()> {
    let end = assert_order_does_not_matter("agent", &["started", "tool", "ended", "analyzed"]).await?;
    assert_eq!(end["log"]["summary"], "Short and friendly.");
    Ok(())
}

#[tokio::test]
async fn an_opt_out_cancels_all_that_waits_in_the_same_transaction() -> Result<()> {
    let scene = Scene::set(2).await?;
    // The line was busy: the queue would call again. Another campaign of the organization waits for the same person.
    let hangup = scene.campaign.carrier.hangup(&scene.calls[0], &callbacks::BUSY)?;
    assert_eq!(hangup.send(&scene.intake).await?.json()["result"], "applied");
    let queue = "select q.status || ' ' || coalesce(q.last_error, '-') || ' ' || m.status from public.call_queue as q
                 join public.campaign_leads as m on m.campaign_id = q.campaign_id and m.lead_id = q.lead_id
                 where q.lead_id = (select lead_id from public.call_logs where id = $ATTEMPT)";
    assert_eq!(scene.asked(0, queue).await?, "queued busy queued");
    scene.tell("retell", "function", 0).await?;
    assert_eq!(scene.asked(0, queue).await?, "failed opted_out opted_out");
    assert_eq!(scene.stack.value("select status || ' ' || open_leads from public.campaigns").await?, "running 1");
    let before = scene.calls.len();
    assert_eq!(scene.campaign.dial(&scene.stack).await?.len(), 0, "nobody is called, of {before}");
    Ok(())
}

#[tokio::test]
async fn a_callback_is_kept_whether_it_is_told_before_the_hangup_or_after() -> Result<()> {
    let scene = Scene::set(3).await?;
    let hangup = |index: usize| scene.campaign.carrier.hangup(&scene.calls[index], &TALKED);
    scene.tell("elevenlabs", "post_call_transcription", 0).await?;
    hangup(0)?.send(&scene.intake).await?;
    hangup(1)?.send(&scene.intake).await?;
    scene.tell("elevenlabs", "post_call_transcription", 1).await?;
    let row = "select q.status || ' ' || q.wait_reason || ' ' || q.attempt_count || ' ' || m.status || ' ' ||
                 (q.next_retry_at >= l.callback_time) || ' ' || (q.next_retry_at < l.callback_time + interval '16 hours') || ' ' || (q.metadata = '{}')
               from public.call_queue as q
               join public.leads as l on l.id = q.lead_id
               join public.campaign_leads as m on m.campaign_id = q.campaign_id and m.lead_id = q.lead_id
               where q.lead_id = (select lead_id from public.call_logs where id = $ATTEMPT)";
    for index in [0, 1] {
        assert_eq!(scene.asked(index, row).await?, "queued callback 1 queued true true true", "{index}");
    }
    assert_eq!(
        scene.stack.value("select status || ' ' || open_leads || ' ' || answered_calls from public.campaigns").await?,
        "running 3 2"
    );
    Ok(())
}

#[tokio::test]
async fn a_word_that_nobody_has_mapped_is_kept_counted_and_shown() -> Result<()> {
    let scene = Scene::set(1).await?;
    for said in ["first", "second"] {
        let body = recorded("retell", "call_ended", scene.attempt(0)?, said)?
            .replace("user_hangup", "carried_off_by_an_eagle");
        let body = body.replace(&format!("call_{said}"), "call_same");
        let told = scene.source("retell").deliver(&body).send(&scene.intake).await?.json();
        assert_eq!(told["result"], "applied", "{told}");
    }
    let kept = "select disconnect_reason || ' ' || disconnect_notes from public.call_logs";
    assert_eq!(scene.stack.value(kept).await?, "carried_off_by_an_eagle carried_off_by_an_eagle");
    let shown = scene.stack.rpc(scene.campaign.tenant.jwt(), "list_unmapped_values", &json!({})).await?;
    assert_eq!(
        (&shown[0]["field"], &shown[0]["value"], &shown[0]["seen"]),
        (&json!("disconnection_reason"), &json!("carried_off_by_an_eagle"), &json!(2)),
        "{shown}"
    );
    let stranger = scene::sign_up(&scene.stack, "Others").await?;
    assert_eq!(scene.stack.rpc(stranger.jwt(), "list_unmapped_values", &json!({})).await?, json!([]));
    Ok(())
}

#[tokio::test]
async fn an_agent_of_another_organization_changes_nothing() -> Result<()> {
    let scene = Scene::set(1).await?;
    let stranger = scene::sign_up(&scene.stack, "Others").await?;
    let theirs = agents::connect(&scene.stack, &scene.intake, &stranger, "retell", json!({})).await?;
    let body = recorded("retell", "function", scene.attempt(0)?, "x")?;
    let before = Fingerprint::of(&scene.stack.sql).await?;
    let answer = theirs.deliver(&body).send(&scene.intake).await?;
    assert_eq!(answer.status, 200, "a function's result is all that its agent reads");
    let changed = before.changed(&Fingerprint::of(&scene.stack.sql).await?);
    assert!(changed.iter().all(|table| table.starts_with("private.webhook_event")), "{changed:?}");
    let kept = "select status || ' ' || error || ' ' || (organization_id = (select organization_id from public.webhook_sources where id::text = source_id)) from private.webhook_events";
    assert_eq!(scene.stack.value(kept).await?, "orphan other_organization true");
    Ok(())
}
