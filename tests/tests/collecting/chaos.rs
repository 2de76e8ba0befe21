//! A month of dunning in an hour of trouble: handlers at once that die anywhere, answers and requests that are lost, webhooks that come
//! twice, late, in any order or never. Judged by the gateways' own books.

use super::*;
use futures::future::try_join_all;
use rand::{Rng, SeedableRng, rngs::StdRng, seq::SliceRandom};
use std::{collections::BTreeMap, time::Duration};
use tokio::time::timeout;

/// How many of each kind there are.
const EACH: usize = 5;
const HANDLERS: usize = 3;
/// Days of February and March, counted on, and hours of each.
const DAYS: std::ops::Range<u32> = 13..37;
const HOURS: [&str; 3] = ["05:00", "08:05", "14:00"];

struct Chaos {
    stand: Stand,
    rng: StdRng,
    /// Webhooks that are on their way.
    letters: Vec<HttpEvent>,
    killed: usize,
}

impl Chaos {
    fn way(&mut self) -> Way {
        match self.rng.random_range(0..10) {
            0..=3 => Way::AnswerLost,
            4 | 5 => Way::RequestLost,
            _ => Way::Clear,
        }
    }

    /// Handlers at once, of which some die.
    async fn handlers(&mut self) -> Result<()> {
        for _ in 0..3 {
            let (one, other) = (self.way(), self.way());
            self.stand.stripe.lose([one]);
            self.stand.razorpay.lose([other]);
        }
        let mut running = Vec::new();
        for _ in 0..HANDLERS {
            let invoicing = self.stand.stack.invoicing()?;
            let dies_after = self.rng.random_bool(0.4).then(|| Duration::from_millis(self.rng.random_range(0..60)));
            running.push(async move {
                let work = async {
                    // A deadlock or a row that moved on is the next run's.
                    let _ = events::job(&invoicing, "collect").await;
                };
                match dies_after {
                    Some(after) => timeout(after, work).await.is_err(),
                    None => {
                        work.await;
                        false
                    }
                }
            });
        }
        let died = futures::future::join_all(running).await;
        self.killed += died.into_iter().filter(|died| *died).count();
        Ok(())
    }

    /// Some of what is on its way arrives, some of it twice, some never.
    async fn webhooks(&mut self) -> Result<()> {
        for body in self.stand.stripe.take_events()? {
            self.letters.push(commerce::stripe(self.stand.stripe_source, &body));
        }
        for body in self.stand.razorpay.take_events()? {
            self.letters.push(commerce::razorpay(self.stand.razorpay_source, &body));
        }
        self.letters.shuffle(&mut self.rng);
        let mut late = Vec::new();
        let mut sent = Vec::new();
        for letter in std::mem::take(&mut self.letters) {
            match self.rng.random_range(0..10) {
                0..=1 => {}
                2..=4 => late.push(letter),
                5 => sent.extend([letter.clone(), letter]),
                _ => sent.push(letter),
            }
        }
        self.letters = late;
        let intake = &self.stand.intake;
        try_join_all(sent.into_iter().map(|letter| async move {
            let answer = letter.send(intake).await?;
            // One that met the other half of the same news in the database is sent again by the gateway.
            ensure!(matches!(answer.status, 200 | 202 | 503), "a webhook: {} {}", answer.status, answer.body);
            anyhow::Ok(())
        }))
        .await?;
        Ok(())
    }

    async fn step(&mut self, time: &str) -> Result<()> {
        self.stand.clock(time).await?;
        self.stand.close().await?;
        for _ in 0..2 {
            self.handlers().await?;
            self.webhooks().await?;
            self.stand.later().await?;
        }
        let decided =
            if self.rng.random_bool(0.7) { Reaction::Approve } else { Reaction::Decline("insufficient_funds") };
        if self.rng.random_bool(0.3) {
            self.stand.stripe.settle(decided);
            self.stand.razorpay.settle(decided);
        }
        // Somebody who got a link pays by it now and then.
        let link = "select url from private.gateway_requests where kind = 'link' and state in ('open', 'unknown') and url is not null order by random() limit 1";
        let url = self.stand.value(link).await?;
        if !url.is_empty() && self.rng.random_bool(0.15) {
            let _ = self.stand.stripe.visit(&url);
            let _ = self.stand.razorpay.visit(&url);
        }
        Ok(())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_pays_an_invoice_twice_whoever_dies_and_whatever_is_lost() -> Result<()> {
    let stand = Stand::start().await?;
    let mut rng = StdRng::seed_from_u64(7);
    let mut payers = Vec::new();
    for n in 0..EACH {
        for (gateway, kind, token) in [
            ("stripe", "card", "pm"),
            ("razorpay", "upi", "token_upi"),
            ("razorpay", "card", "token_card"),
            ("", "", ""),
        ] {
            let token = format!("{token}_{n}");
            let method = (!gateway.is_empty()).then_some((gateway, kind, token.as_str()));
            payers.push(stand.payer(&format!("Payer {n} {token}"), method).await?);
            let reactions: &[Reaction] = match rng.random_range(0..6) {
                0 => &[],
                1 => &[Reaction::Slow],
                2 => &[Reaction::Decline("insufficient_funds"), Reaction::Slow],
                3 => &[Reaction::Decline("insufficient_funds"); 3],
                4 => &[Reaction::Decline("insufficient_funds"), Reaction::Approve],
                _ if gateway == "stripe" => &[Reaction::Decline("lost_card")],
                _ => &[Reaction::Decline("mandate_revoked")],
            };
            let at = if gateway == "stripe" { &stand.stripe } else { &stand.razorpay };
            at.react(&token, reactions.iter().copied());
        }
    }
    stand.clock("2026-02-01T00:05").await?;
    stand.close().await?;
    let mut chaos = Chaos { stand, rng, letters: Vec::new(), killed: 0 };
    for day in DAYS {
        for hour in HOURS {
            let (month, day) = if day > 28 { (3, day - 28) } else { (2, day) };
            chaos.step(&format!("2026-{month:02}-{day:02}T{hour}")).await?;
        }
    }
    // The trouble is over; what is under way comes to its end.
    let stand = &chaos.stand;
    stand.clock("2026-03-12T08:05").await?;
    for _ in 0..4 {
        stand.later().await?;
        stand.close().await?;
        stand.stripe.settle(Reaction::Approve);
        stand.razorpay.settle(Reaction::Approve);
        stand.collect().await?;
        stand.deliver().await?;
    }

    let mut books: BTreeMap<String, Vec<Entry>> = BTreeMap::new();
    for entry in stand.stripe.entries().into_iter().chain(stand.razorpay.entries()) {
        books.entry(entry.invoice.clone()).or_default().push(entry);
    }
    let january = "select count(*) from public.invoices where first_day = '2026-01-01'";
    assert_eq!(stand.value(january).await?, payers.len().to_string());
    for (invoice, entries) in &books {
        assert_eq!(entries.len(), 1, "{invoice} is paid twice: {entries:?}");
        let ours = stand.value(&format!("select status || ' ' || amount_paid_minor || ' ' || currency from public.invoices where id = '{invoice}'")).await?;
        assert_eq!(ours, format!("paid {} {}", entries[0].amount, entries[0].currency), "{invoice}: {entries:?}");
    }
    let paid = stand.value("select count(*) from public.invoices where amount_paid_minor > 0").await?;
    assert_eq!(paid, books.len().to_string(), "what is paid is in a gateway's book");
    let open = "select count(*) from public.invoices where first_day = '2026-01-01' and status not in ('paid', 'uncollectible')";
    assert_eq!(stand.value(open).await?, "0", "every invoice of January is through");
    let payments = "select coalesce(sum(amount_minor), 0) || ' ' || coalesce(sum(applied_minor), 0) from public.payments where status = 'captured'";
    let moved: i64 = books.values().flatten().map(|entry| entry.amount).sum();
    assert_eq!(stand.value(payments).await?, format!("{moved} {moved}"));
    assert_eq!([stand.stripe.faults(), stand.razorpay.faults()], [Vec::<String>::new(), vec![]]);
    let late = "select count(*) from public.subscriptions as s where status <> case when exists (
        select from public.invoices as i where i.subscription_id = s.id and i.past_due_at is not null and i.status in ('open', 'uncollectible')
      ) then 'suspended' else 'active' end::public.subscription_status and status <> 'cancelled'";
    assert_eq!(stand.value(late).await?, "0", "who owes is suspended, who has paid is not");
    let live = "select count(*) from private.gateway_requests as r join public.invoices as i on i.id = r.invoice_id
      where r.kind = 'charge' and r.state in ('submitting', 'unknown', 'open') and i.first_day = '2026-01-01'";
    assert_eq!(stand.value(live).await?, "0");
    let states = "select string_agg(told, ', ' order by told) from (
        select concat_ws(' ', count(*), kind, gateway, state, failure_kind, 'in', sum(submission), 'sendings') as told
        from private.gateway_requests group by kind, gateway, state, failure_kind) as one";
    println!(
        "{} of {} invoices paid, {} handlers died, {} requests at Stripe, {} at Razorpay; {}",
        books.len(),
        stand.value("select count(*) from public.invoices").await?,
        chaos.killed,
        stand.stripe.requests().len(),
        stand.razorpay.requests().len(),
        stand.value(states).await?
    );
    assert!(chaos.killed > 5, "{} handlers died", chaos.killed);
    assert!(!books.is_empty() && books.len() < payers.len() * 2, "some paid and some did not: {}", books.len());
    Ok(())
}
