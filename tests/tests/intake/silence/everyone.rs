//! The same of every other source: other carriers, voice agents, shops, payment gateways and those who send leads, each with all its
//! recorded deliveries, in a database that refuses them, without a database, forged, broken, and as they should be.

use super::*;
use tests::{
    agents::AgentSource,
    commerce::{self, SECRET},
    deliveries::{Account, CARRIERS, Call, recorded},
    scene::Tenant,
};

const LEADS: &str = "/functions/v1/webhook-intake/leads";

/// A delivery, as it is sent, with another signature, and with a body that cannot be read, rightly signed.
struct Sent {
    name: String,
    good: HttpEvent,
    forged: Option<HttpEvent>,
    broken: Option<HttpEvent>,
    /// Whether its answer is for the sender to act on, as a document is, and may say whom to call.
    is_document: bool,
}

/// What must stay unsaid.
#[derive(Default)]
struct Hidden {
    secrets: Vec<String>,
    people: BTreeSet<String>,
    spoken: BTreeSet<String>,
}

impl Hidden {
    /// Everything of a body: numbers as they are written, mail addresses, what was said.
    fn read(&mut self, body: &str) {
        numbers(body, &mut self.people);
        let Ok(value) = serde_json::from_str::<Value>(body) else { return };
        said(&value, &mut self.spoken);
        self.contacts(&value);
    }

    fn contacts(&mut self, value: &Value) {
        match value {
            Value::String(text) => {
                let is_number = text.starts_with('+') && text.bytes().filter(u8::is_ascii_digit).count() >= 10;
                let is_mail = text.split_once('@').is_some_and(|(name, host)| !name.is_empty() && host.contains('.'));
                if (is_number || is_mail) && text.len() < 60 {
                    self.people.insert(text.clone());
                }
            }
            Value::Array(items) => items.iter().for_each(|item| self.contacts(item)),
            Value::Object(map) => map.values().for_each(|item| self.contacts(item)),
            _ => {}
        }
    }

    fn all(&self) -> Vec<&String> {
        self.secrets.iter().chain(&self.people).chain(&self.spoken).collect()
    }
}

/// All deliveries of the carriers that the first test has not, and of Plivo, each to a call of its own.
async fn carriers(stack: &Stack, tenant: &Tenant, hidden: &mut Hidden) -> Result<Vec<Sent>> {
    let mut sent = Vec::new();
    for (carrier, prefix) in CARRIERS.into_iter().zip(5_u32..) {
        let account = Account::create(stack, carrier).await?;
        let credentials: Value = serde_json::from_str(&account.credentials())?;
        let secret = ["auth_token", "signature_secret"].iter().find_map(|name| credentials[name].as_str());
        hidden.secrets.extend(secret.map(str::to_owned));
        let other = Account::new(carrier);
        for (delivery, number) in recorded(carrier)?.into_iter().zip(prefix * 1_000_000..) {
            let call = account.dialled(stack, tenant.id, number).await?;
            for number in [&call.to, &call.from] {
                numbers(number, &mut hidden.people);
            }
            let path = account.path(stack, &call, &delivery.event)?;
            hidden.secrets.push(path.rsplit('/').next().context("a token")?.to_owned());
            let good = account.deliver(stack, &call, &delivery)?;
            hidden.read(std::str::from_utf8(good.sent_body())?);
            let kind = if delivery.json.is_some() { "application/json" } else { "application/x-www-form-urlencoded" };
            let broken = format!("To={0}&[{{\"to\":\"{0}\"", call.to);
            sent.push(Sent {
                name: format!("{carrier} {}", delivery.name),
                good,
                forged: Some(other.send(&path, &call, &delivery)?),
                broken: Some(account.signed(&path, kind, &broken)?),
                is_document: ["answer", "dial"].contains(&delivery.event.as_str()),
            });
            // The same caller, who calls us: at a number that nobody has.
            let inbound = Call { attempt: None, sid: Uuid::new_v4().to_string(), ..call };
            sent.push(Sent {
                name: format!("{carrier} {} of a call to us", delivery.name),
                good: account.send(&account.path(stack, &inbound, "inbound")?, &inbound, &delivery)?,
                forged: None,
                broken: None,
                is_document: true,
            });
        }
    }
    Ok(sent)
}

async fn voice_agents(stack: &Stack, intake: &Intake, tenant: &Tenant, hidden: &mut Hidden) -> Result<Vec<Sent>> {
    let account = Account::create(stack, "plivo").await?;
    let mut sent = Vec::new();
    for (provider, number) in ["retell", "elevenlabs", "vapi", "agent"].into_iter().zip(9_000_000..) {
        let source = agents::connect(stack, intake, tenant, provider, json!({})).await?;
        hidden.secrets.push(source.secret.clone());
        let call = account.dialled(stack, tenant.id, number).await?;
        let attempt = call.attempt.context("an attempt")?;
        for name in agents::names(provider)? {
            let body = agents::recorded(provider, &name, attempt, &format!("{provider}5"))?;
            hidden.read(&body);
            let forger = AgentSource { secret: "another".to_owned(), ..source.clone() };
            sent.push(Sent {
                name: format!("{provider} {name}"),
                good: source.deliver(&body),
                forged: Some(forger.deliver(&body)),
                broken: Some(source.deliver(&body.replace('{', "[{"))),
                is_document: true,
            });
        }
    }
    Ok(sent)
}

/// The topic of a recorded delivery: its name, whose first part is the thing.
fn topic(provider: &str, name: &str) -> String {
    match (provider, name.split_once('_')) {
        ("shopify", Some((thing, what))) => format!("{thing}/{what}"),
        (_, Some((thing, what))) => format!("{thing}.{}", what.trim_end_matches("_completed")),
        (_, None) => name.to_owned(),
    }
}

async fn shops_and_gateways(stack: &Stack, tenant: &Tenant, hidden: &mut Hidden) -> Result<Vec<Sent>> {
    hidden.secrets.push(SECRET.to_owned());
    let mut sent = Vec::new();
    for provider in ["shopify", "woocommerce", "stripe", "razorpay"] {
        let store = match provider {
            "shopify" => Some((tenant, "shop.example.com", "INR")),
            "woocommerce" => Some((tenant, "woo.example.com", "JPY")),
            _ => None,
        };
        let source = commerce::source(stack, provider, store).await?;
        for name in agents::names(provider)? {
            let topic = topic(provider, &name);
            let sign = |body: &[u8]| match provider {
                "shopify" => commerce::shopify(source, &topic, body),
                "woocommerce" => commerce::woocommerce(source, &topic, body),
                "stripe" => commerce::stripe(source, body),
                _ => commerce::razorpay(source, body),
            };
            let body = commerce::delivery(provider, &name)?;
            let text = std::str::from_utf8(&body)?;
            hidden.read(text);
            let good = sign(&body);
            sent.push(Sent {
                name: format!("{provider} {name}"),
                forged: Some(good.clone().body(format!("{text} "))),
                broken: Some(sign(text.replace('{', "[{").as_bytes())),
                good,
                is_document: false,
            });
        }
    }
    Ok(sent)
}

async fn leads(stack: &Stack, tenant: &Tenant, hidden: &mut Hidden) -> Result<Vec<Sent>> {
    let asked = json!({ "name": "CRM", "scopes": ["lead.write"] });
    let made = stack.rpc(tenant.jwt(), "create_api_key", &asked).await?;
    let key = made["key"].as_str().context("a key")?.to_owned();
    let form = json!({
        "name": "Site", "consent_text": "You may call me", "consent_scopes": ["call_service"], "rate_per_minute": 60,
        "fields": [{ "name": "name", "required": true }, { "name": "phone", "required": true }, { "name": "email" }],
    });
    let (status, form) = stack.rest(tenant.jwt(), "POST", "lead_forms?select=id", Some(&form)).await?;
    assert!(status.is_success(), "{status} {form}");
    let lead = json!({ "name": "Asha", "phone": "+919812300001", "email": "asha.of.leads@example.com", "notes": "Asked for a garden" });
    let mut filled = lead.clone();
    filled["form_id"] = form[0]["id"].clone();
    hidden.read(&lead.to_string());
    hidden.read(r#""+919812300002""#);
    hidden.spoken.insert("Asked for a garden".to_owned());
    let another = format!("{}{}", &key[..key.len() - 6], "000000");
    let event = |body: &str, key: Option<&str>| {
        let event = HttpEvent::post(LEADS).header("content-type", "application/json").body(body);
        key.map_or(event.clone(), |key| event.header("x-api-key", key))
    };
    let broken = |body: &Value| body.to_string().replace('{', "[{");
    let several =
        json!([lead, { "phone": "+919812300002", "project_id": Uuid::new_v4() }, { "phone": "+9198123000021234567" }]);
    let sent = [("one", lead.clone()), ("several", several)].map(|(name, body)| Sent {
        name: format!("leads by key: {name}"),
        good: event(&body.to_string(), Some(&key)),
        forged: Some(event(&body.to_string(), Some(&another))),
        broken: Some(event(&broken(&body), Some(&key))),
        is_document: false,
    });
    let mut sent = Vec::from(sent);
    sent.push(Sent {
        name: "leads by form".to_owned(),
        good: event(&filled.to_string(), None),
        forged: None,
        broken: Some(event(&broken(&filled), None)),
        is_document: false,
    });
    hidden.secrets.extend([key, another]);
    Ok(sent)
}

/// Makes every table refuse with a message that quotes the row, or lets it be again.
async fn quoting(stack: &Stack, refuses: bool) -> Result<()> {
    const TABLES: [&str; 9] = [
        "call_logs",
        "calls",
        "conversations",
        "customers",
        "products",
        "orders",
        "payments",
        "leads",
        "lead_activities",
    ];
    let function = "create or replace function private.quote() returns trigger language plpgsql as
         $$ begin raise 'no room for %', new::text using detail = new::text, hint = new::text; end $$;";
    let triggers: String = TABLES
        .iter()
        .map(|table| match refuses {
            true => format!("create trigger quote before insert or update on public.{table} for each row execute function private.quote();"),
            false => format!("drop trigger quote on public.{table};"),
        })
        .collect();
    Ok(stack.sql.batch_execute(&format!("{function}{triggers}")).await?)
}

#[tokio::test]
async fn no_source_is_quoted_in_what_it_must_not() -> Result<()> {
    let lines = Lines::default();
    let into = lines.clone();
    let _captured = telemetry::capture("info", move || into.clone());
    let stack = Stack::start(supervisor_binary!()).await?;
    let tenant = scene::sign_up(&stack, "Everyone").await?;
    let (intake, mut told, mut hidden) = (stack.intake()?, Told::default(), Hidden::default());
    let mut sent = carriers(&stack, &tenant, &mut hidden).await?;
    sent.extend(voice_agents(&stack, &intake, &tenant, &mut hidden).await?);
    sent.extend(shops_and_gateways(&stack, &tenant, &mut hidden).await?);
    sent.extend(leads(&stack, &tenant, &mut hidden).await?);

    // Nothing can be applied, and the database says why at length; then it is tried again.
    quoting(&stack, true).await?;
    let mut failed = BTreeSet::new();
    for one in &sent {
        let answer = one.good.send(&intake).await?;
        if answer.json()["result"] == "failed" || answer.status >= 400 {
            failed.insert(one.name.split(' ').next().unwrap_or_default().to_owned());
        }
        if !one.is_document || answer.status >= 400 {
            told.0.push(answer.body);
        }
    }
    stack.sql.batch_execute("update private.webhook_events set next_try_at = now() where status = 'failed'").await?;
    told.0.push(events::job(&intake, "sweep").await?.to_string());
    quoting(&stack, false).await?;
    for source in ["plivo", "twilio", "telnyx", "vonage", "retell", "shopify", "woocommerce", "leads"] {
        assert!(failed.contains(source), "{source} never failed: {failed:?}");
    }

    // Forged, and rightly signed nonsense.
    for one in &sent {
        if let Some(forged) = &one.forged {
            let answer = told.send(&intake, forged.clone()).await?;
            assert!(matches!(answer.status, 401 | 403), "{}: {} {}", one.name, answer.status, answer.body);
        }
        if let Some(broken) = &one.broken {
            let answer = broken.send(&intake).await?;
            assert!(answer.status < 500, "{}: {} {}", one.name, answer.status, answer.body);
            // An answered callee gets a document whatever is told of them.
            if !one.is_document || answer.status >= 400 {
                told.0.push(answer.body);
            }
        }
    }

    // Without a database, which drained messages find again.
    stack.postgrest.kill().await?;
    for one in &sent {
        let answer = one.good.send(&intake).await?;
        if !one.is_document || answer.status >= 400 {
            told.0.push(answer.body);
        }
    }
    stack.postgrest.restart().await?;
    stack.intake_queue.deliver(&intake).await?;

    // As it should be.
    for one in &sent {
        let answer = one.good.send(&intake).await?;
        assert!(answer.status < 500, "{}: {} {}", one.name, answer.status, answer.body);
        if !one.is_document || answer.status >= 400 {
            told.0.push(answer.body);
        }
    }
    for job in ["sweep", "retention"] {
        told.0.push(events::job(&intake, job).await?.to_string());
    }

    let log = lines.text();
    println!("{} deliveries, {} lines, {} answers", sent.len(), log.lines().count(), told.0.len());
    println!(
        "{} secrets, {} numbers and addresses, {} sentences",
        hidden.secrets.len(),
        hidden.people.len(),
        hidden.spoken.len()
    );
    assert!(log.lines().count() > 100 && sent.len() > 100, "there is a log to look at: {log}");
    assert!(hidden.people.len() > 50 && hidden.spoken.len() > 10, "{:?} {:?}", hidden.people, hidden.spoken);
    assert_untold(&log, &told, &hidden.all());
    let rows = rows_with(&stack, &hidden.secrets).await?;
    assert!(rows.is_empty(), "secrets are in {rows:?}");
    Ok(())
}
