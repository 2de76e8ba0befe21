//! Money that is asked for: by mandate and by link, at gateways that speak their real protocols and decline, delay, double and lose their
//! answers. Their own books say what came of it.

mod chaos;
mod people;

use anyhow::{Context, Result, ensure};
use invoice_generation::Invoicing;
use serde_json::{Value, json};
use shared::seal::Sealer;
use tests::{
    Stack, commerce,
    events::{self, Answer, HttpEvent},
    gateways::{Entry, Gateway, Name, RAZORPAY_KEY, Reaction, STRIPE_KEY, Way},
    scene::{self, Tenant},
    supervisor_binary,
};
use uuid::Uuid;
use webhook_intake::Intake;

const FUNCTION: &str = "/functions/v1/invoice-generation";
/// What every invoice comes to: below what a mandate of India pays by itself.
const TOTAL: i64 = 825_882;

struct Stand {
    stack: Stack,
    invoicing: Invoicing,
    intake: Intake,
    stripe: Gateway,
    razorpay: Gateway,
    stripe_source: Uuid,
    razorpay_source: Uuid,
}

impl Stand {
    /// An issuer in Kolkata, a plan, both gateways; the 1st of January at ten.
    async fn start() -> Result<Self> {
        let stack = Stack::start(supervisor_binary!()).await?;
        let stripe = Gateway::start(Name::Stripe).await?;
        let razorpay = Gateway::start(Name::Razorpay).await?;
        stack
            .sql
            .batch_execute(
                "insert into private.billing_issuer (legal_name, state_code, country_code, timezone, payment_terms_days)
                 values ('Issuer', 'KA', 'IN', 'Asia/Kolkata', 15)
                 on conflict on constraint billing_issuer_pkey do update
                 set legal_name = 'Issuer', gstin = null, state_code = 'KA', country_code = 'IN', timezone = 'Asia/Kolkata', payment_terms_days = 15;
                 insert into public.tax_rates (country_code, scope, name, rate_bp, position) values ('IN', 'inter_state', 'IGST', 1800, 10)
                 on conflict on constraint tax_rates_version_key do nothing;
                 insert into public.subscription_plans (slug, name) values ('small', 'Small');
                 select private.set_plan_price('small', 'monthly', 'INR', '{\"base_minor\": 699900}', '2025-01-01');
                 update private.dunning_policy set grace_days = 0, retry_days = '{1,3,7}', retry_time = '08:00', suspend_after_days = 10,
                   uncollectible_after_days = 16, mandate_limits = '{\"INR\": 1500000}'",
            )
            .await
            .context("the issuer")?;
        let sealer = Sealer::new(&stack.keys.secrets()?.seal_keys)?;
        for (gateway, credentials, url, priority) in [
            ("stripe", json!({ "secret_key": STRIPE_KEY }), &stripe.url, 200),
            ("razorpay", json!({ "key_id": RAZORPAY_KEY.0, "key_secret": RAZORPAY_KEY.1 }), &razorpay.url, 100),
        ] {
            let id = Uuid::new_v4();
            let sealed = sealer.seal(&credentials.to_string(), &id.to_string())?;
            stack
                .sql
                .execute(
                    "insert into private.payment_accounts (id, gateway, credentials_sealed, api_base, return_url, priority)
                     values ($1, $2::text::public.payment_gateway, $3, $4, 'https://app.example.com/billing', $5)",
                    &[&id, &gateway, &sealed, &url.as_str(), &priority],
                )
                .await?;
        }
        let stripe_source = commerce::source(&stack, "stripe", None).await?;
        let razorpay_source = commerce::source(&stack, "razorpay", None).await?;
        let (invoicing, intake) = (stack.invoicing()?, stack.intake()?);
        let stand = Self { stack, invoicing, intake, stripe, razorpay, stripe_source, razorpay_source };
        stand.clock("2026-01-01T10:00").await?;
        Ok(stand)
    }

    /// Sets business time, ours and the gateways'; in Kolkata.
    async fn clock(&self, time: &str) -> Result<()> {
        let time = format!("{time}:00+05:30");
        self.stack.set_clock(&time).await?;
        let business = chrono::DateTime::parse_from_rfc3339(&time)?.to_utc();
        self.stripe.set_clock(business);
        self.razorpay.set_clock(business);
        Ok(())
    }

    /// An organization that subscribes, and pays by this method, if any: gateway, type, token.
    async fn payer(&self, name: &str, method: Option<(&str, &str, &str)>) -> Result<Tenant> {
        let tenant = scene::sign_up(&self.stack, name).await?;
        let sql = &self.stack.sql;
        sql.execute(
            "update public.organizations set state_code = 'MH', contact_number = '+919800000001' where id = $1",
            &[&tenant.id],
        )
        .await?;
        // The free plan that everybody begins with is over.
        sql.execute("update public.subscriptions set status = 'cancelled', next_invoice_at = null, cancelled_at = now() where organization_id = $1", &[&tenant.id])
            .await
            .context("the free plan")?;
        sql.query_one(
            "select private.subscribe_organization($1, 'small', 'active', private.clock_now())",
            &[&tenant.id],
        )
        .await
        .context("the subscription")?;
        if let Some((gateway, kind, token)) = method {
            let last4 = (kind == "card").then_some("4242");
            let request = json!({ "v": 1, "organization_id": tenant.id, "gateway": gateway, "type": kind,
                "payment_method_id": token, "customer_id": format!("cus_{token}"), "last4": last4 });
            sql.query_one("select public.save_payment_method($1)", &[&request]).await.context("the method")?;
        }
        Ok(tenant)
    }

    async fn close(&self) -> Result<Value> {
        events::job(&self.invoicing, "close_periods").await
    }

    /// The schedule's job, once.
    async fn collect(&self) -> Result<Value> {
        events::job(&self.invoicing, "collect").await
    }

    /// Delivers what the gateways tell.
    async fn deliver(&self) -> Result<()> {
        for body in self.stripe.take_events()? {
            self.send(commerce::stripe(self.stripe_source, &body)).await?;
        }
        for body in self.razorpay.take_events()? {
            self.send(commerce::razorpay(self.razorpay_source, &body)).await?;
        }
        Ok(())
    }

    async fn send(&self, event: HttpEvent) -> Result<()> {
        let answer = event.send(&self.intake).await?;
        // 202: Razorpay tells of a link's payment before it says of which link, and of a mandate's rupee.
        ensure!(matches!(answer.status, 200 | 202), "a webhook: {} {}", answer.status, answer.body);
        Ok(())
    }

    /// Whoever was at it is not any more, and eleven minutes have passed; but for what a transaction still holds.
    async fn later(&self) -> Result<()> {
        self.stack
            .sql
            .batch_execute(
                "update private.gateway_requests set lease_until = now() - interval '1 second', asked_at = asked_at - interval '11 minutes'
                 where id in (select id from private.gateway_requests where lease_until is not null for no key update skip locked)",
            )
            .await
            .context("the leases")
    }

    async fn value(&self, sql: &str) -> Result<String> {
        self.stack.value(sql).await
    }

    /// The requests of an organization in order, with their states.
    async fn requests(&self, tenant: &Tenant) -> Result<String> {
        self.value(&format!(
            "select string_agg(concat_ws(' ', kind, state, failure_kind), ', ' order by created_at, id)
             from private.gateway_requests where organization_id = '{}'",
            tenant.id
        ))
        .await
    }

    /// The invoices of an organization in order, with what came.
    async fn invoices(&self, tenant: &Tenant) -> Result<String> {
        self.value(&format!(
            "select string_agg(status || ' ' || amount_paid_minor, ', ' order by invoice_number)
             from public.invoices where organization_id = '{}'",
            tenant.id
        ))
        .await
    }

    async fn invoice_id(&self, tenant: &Tenant) -> Result<String> {
        let sql = format!("select id::text from public.invoices where organization_id = '{}' limit 1", tenant.id);
        self.value(&sql).await
    }

    /// January is billed; it is the day before the invoices are due, long enough before the debit for a notice.
    async fn billed(&self) -> Result<()> {
        self.clock("2026-02-01T00:05").await?;
        self.close().await?;
        self.clock("2026-02-14T08:00").await?;
        self.collect().await?;
        Ok(())
    }

    async fn post(&self, tenant: &Tenant, path: &str, body: Value) -> Result<Answer> {
        HttpEvent::post(&format!("{FUNCTION}/{path}")).bearer(tenant.jwt()).json(&body)?.send(&self.invoicing).await
    }
}

fn paid(entries: &[Entry]) -> Vec<i64> {
    entries.iter().map(|entry| entry.amount).collect()
}

#[tokio::test]
async fn a_mandate_is_charged_on_its_day_and_never_again() -> Result<()> {
    let stand = Stand::start().await?;
    let card = stand.payer("Card", Some(("stripe", "card", "pm_card"))).await?;
    let upi = stand.payer("Upi", Some(("razorpay", "upi", "token_upi_1"))).await?;
    stand.billed().await?;
    assert_eq!(stand.requests(&upi).await?, "charge waiting");
    assert_eq!(
        stand.value("select string_agg(payload ->> 'amount_minor', ',') from private.outbox where topic = 'invoice.debit_notice'").await?,
        "", "the notice is not given two days before"
    );
    stand.clock("2026-02-15T05:00").await?;
    stand.collect().await?;
    assert_eq!(
        stand.razorpay.requests(),
        ["GET v1/orders", "POST v1/orders"],
        "the holder is told by the gateway, a day before"
    );
    let notice = "select payload ->> 'amount_minor' || ' ' || (payload ->> 'debit_at') from private.outbox where topic = 'invoice.debit_notice'";
    assert_eq!(stand.value(notice).await?, "825882 2026-02-16T02:30:00+00:00");
    assert_eq!((stand.stripe.entries(), stand.razorpay.entries()), (vec![], vec![]));

    stand.clock("2026-02-16T08:05").await?;
    assert_eq!(stand.collect().await?, json!({ "asked": 2, "unknown": 0, "more": false }));
    assert_eq!((paid(&stand.stripe.entries()), paid(&stand.razorpay.entries())), (vec![TOTAL], vec![TOTAL]));
    // Stripe says at once that it is paid, Razorpay by its webhook.
    assert_eq!((stand.invoices(&card).await?, stand.invoices(&upi).await?), ("paid 825882".into(), "open 0".into()));
    stand.deliver().await?;
    assert_eq!(stand.invoices(&upi).await?, "paid 825882");
    assert_eq!(
        (stand.requests(&card).await?, stand.requests(&upi).await?),
        ("charge succeeded".into(), "charge succeeded".into())
    );
    for _ in 0..3 {
        stand.later().await?;
        assert_eq!(stand.collect().await?["asked"], 0);
    }
    assert_eq!(stand.razorpay.faults(), Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn an_answer_that_is_lost_is_looked_for_before_anything_is_sent_again() -> Result<()> {
    let stand = Stand::start().await?;
    // Two whose charge is done and the answer lost, two whose request is lost, at either gateway.
    let mut payers = Vec::new();
    for (gateway, kind, token) in [("stripe", "card", "pm_1"), ("razorpay", "upi", "token_upi_1")] {
        payers.push(stand.payer(token, Some((gateway, kind, token))).await?);
    }
    stand.billed().await?;
    stand.clock("2026-02-15T05:00").await?;
    stand.collect().await?;
    stand.clock("2026-02-16T08:05").await?;
    stand.stripe.lose([Way::AnswerLost]);
    stand.razorpay.lose([Way::AnswerLost]);
    assert_eq!(stand.collect().await?["unknown"], 2);
    for payer in &payers {
        assert_eq!(stand.requests(payer).await?, "charge unknown");
        assert_eq!(stand.invoices(payer).await?, "open 0");
    }
    assert_eq!(stand.collect().await?["asked"], 0, "nobody asks while the answer may come");
    stand.later().await?;
    stand.collect().await?;
    for payer in &payers {
        assert_eq!(
            (stand.requests(payer).await?, stand.invoices(payer).await?),
            ("charge succeeded".into(), "paid 825882".into())
        );
    }
    let charges = |requests: Vec<String>, path: &str| requests.iter().filter(|asked| *asked == path).count();
    assert_eq!(charges(stand.stripe.requests(), "POST v1/payment_intents"), 1);
    assert_eq!(charges(stand.razorpay.requests(), "POST v1/payments/create/recurring"), 1);
    assert_eq!((paid(&stand.stripe.entries()), paid(&stand.razorpay.entries())), (vec![TOTAL], vec![TOTAL]));

    // What never arrived is not found, and is sent again only when nothing can be on its way any more.
    stand.clock("2026-03-01T00:05").await?;
    stand.close().await?;
    stand.clock("2026-03-15T05:00").await?;
    stand.collect().await?;
    stand.clock("2026-03-16T08:05").await?;
    stand.stripe.lose([Way::RequestLost]);
    stand.razorpay.lose([Way::RequestLost]);
    assert_eq!(stand.collect().await?["unknown"], 2);
    let soon = "update private.gateway_requests set lease_until = now() where lease_until is not null";
    stand.stack.sql.batch_execute(soon).await?;
    stand.collect().await?;
    assert_eq!(stand.stripe.entries().len(), 1, "it may still arrive");
    assert_eq!(stand.requests(&payers[0]).await?, "charge succeeded, charge unknown");
    stand.later().await?;
    stand.collect().await?;
    stand.later().await?;
    stand.collect().await?;
    stand.deliver().await?;
    assert_eq!((paid(&stand.stripe.entries()), paid(&stand.razorpay.entries())), (vec![TOTAL; 2], vec![TOTAL; 2]));
    for payer in &payers {
        assert_eq!(stand.invoices(payer).await?, "paid 825882, paid 825882");
    }
    assert_eq!(stand.razorpay.faults(), Vec::<String>::new());
    Ok(())
}

#[tokio::test]
async fn a_soft_decline_is_tried_again_and_a_hard_one_asks_for_another_method() -> Result<()> {
    let stand = Stand::start().await?;
    let soft = stand.payer("Soft", Some(("razorpay", "upi", "token_upi_soft"))).await?;
    let hard = stand.payer("Hard", Some(("stripe", "card", "pm_stolen"))).await?;
    let code = stand.payer("Code", Some(("stripe", "card", "pm_code"))).await?;
    let slow = stand.payer("Slow", Some(("razorpay", "upi", "token_upi_slow"))).await?;
    stand.razorpay.react("token_upi_soft", [Reaction::Decline("insufficient_funds"), Reaction::Approve]);
    stand.razorpay.react("token_upi_slow", [Reaction::Slow]);
    stand.stripe.react("pm_stolen", [Reaction::Decline("stolen_card")]);
    stand.stripe.react("pm_code", [Reaction::Decline("authentication_required")]);
    stand.billed().await?;
    stand.clock("2026-02-15T05:00").await?;
    stand.collect().await?;
    stand.clock("2026-02-16T08:05").await?;
    stand.collect().await?;
    stand.collect().await?;
    stand.deliver().await?;
    assert_eq!(stand.requests(&soft).await?, "charge failed soft");
    assert_eq!(stand.requests(&hard).await?, "charge failed hard, link open");
    assert_eq!(stand.requests(&code).await?, "charge failed authentication, link open");
    assert_eq!(stand.requests(&slow).await?, "charge open");
    let default = format!("select is_default::text from public.payment_methods where organization_id = '{}'", hard.id);
    assert_eq!(stand.value(&default).await?, "false", "a stolen card is charged no more");
    let told = "select string_agg(topic, ',' order by topic) from private.outbox where topic in ('payment_method.failed', 'invoice.payment_failed')";
    assert_eq!(
        stand.value(told).await?,
        "invoice.payment_failed,invoice.payment_failed,invoice.payment_failed,payment_method.failed"
    );

    // The due date is over: the schedule asks again on the day after, where that is of use.
    for time in ["17T00:05", "17T08:05", "18T00:05", "18T08:05", "18T09:00"] {
        stand.clock(&format!("2026-02-{time}")).await?;
        stand.close().await?;
        stand.collect().await?;
        stand.deliver().await?;
    }
    assert_eq!(stand.invoices(&soft).await?, "paid 825882", "{}", stand.requests(&soft).await?);
    assert_eq!(stand.requests(&slow).await?, "charge open", "nothing is asked for again while it is not decided");
    assert_eq!(stand.requests(&hard).await?, "charge failed hard, link open");
    stand.razorpay.settle(Reaction::Approve);
    stand.deliver().await?;
    assert_eq!(
        (stand.invoices(&slow).await?, stand.requests(&slow).await?),
        ("paid 825882".into(), "charge succeeded".into())
    );
    assert_eq!(stand.stripe.entries(), []);
    assert_eq!(paid(&stand.razorpay.entries()), [TOTAL, TOTAL]);
    assert_eq!(stand.razorpay.faults(), Vec::<String>::new());
    Ok(())
}
