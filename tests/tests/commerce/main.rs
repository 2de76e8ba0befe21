//! Shops, payment gateways and those who send leads: each recorded delivery changes the row that it names, in whatever order it comes,
//! however often, and only when it is signed.

mod clients;
mod gateways;
mod leads;
mod shops;
mod signatures;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tests::{
    Stack,
    commerce::{SECRET, SHOP, delivery, hmac, path, razorpay, shopify, source, stripe, stripe_at, woocommerce},
    events::{Answer, HttpEvent},
    scene::{self, Tenant},
    supervisor_binary,
};
use uuid::Uuid;
use webhook_intake::Intake;

/// A stack with an organization that has a shop at Shopify and one at WooCommerce, and the sources of the platform.
struct Stand {
    stack: Stack,
    intake: Intake,
    tenant: Tenant,
    shopify: Uuid,
    woocommerce: Uuid,
    stripe: Uuid,
    razorpay: Uuid,
}

impl Stand {
    async fn start() -> Result<Self> {
        let stack = Stack::start(supervisor_binary!()).await?;
        let tenant = scene::sign_up(&stack, "Near").await?;
        // Erasing is another part's; where that part is not there, nothing is written down elsewhere.
        stack
            .sql
            .batch_execute(
                "do $$ begin if to_regprocedure('private.erase(jsonb,timestamptz)') is null then
                   create function private.erase(request jsonb, at timestamptz) returns jsonb language sql as 'select ''{}''::jsonb';
                 end if; end $$",
            )
            .await?;
        let shopify = source(&stack, "shopify", Some((&tenant, "shop.example.com", "INR"))).await?;
        let woocommerce = source(&stack, "woocommerce", Some((&tenant, "woo.example.com", "JPY"))).await?;
        let stripe = source(&stack, "stripe", None).await?;
        let razorpay = source(&stack, "razorpay", None).await?;
        let intake = stack.intake()?;
        Ok(Self { stack, intake, tenant, shopify, woocommerce, stripe, razorpay })
    }

    /// A value from the database, as text.
    async fn value(&self, sql: &str) -> Result<String> {
        self.stack.value(sql).await
    }

    /// Sends an event and fails unless it ends so.
    async fn expect(&self, event: &HttpEvent, result: &str) -> Result<()> {
        let answer = event.send(&self.intake).await?;
        let error =
            self.value("select coalesce(error, '') from private.webhook_events order by id desc limit 1").await?;
        assert_eq!(answer.json()["result"], result, "{} {} {error}", answer.status, answer.body);
        Ok(())
    }

    /// Applies again what failed, as if its time had come.
    async fn sweep(&self) -> Result<()> {
        self.stack
            .sql
            .batch_execute("update private.webhook_events set next_try_at = now() where status = 'failed'")
            .await?;
        tests::events::job(&self.intake, "sweep").await?;
        Ok(())
    }
}

/// All orders of `0..n`.
fn orders(n: usize) -> Vec<Vec<usize>> {
    if n == 0 {
        return vec![Vec::new()];
    }
    let shorter = orders(n - 1);
    shorter
        .into_iter()
        .flat_map(|order| {
            (0..n).map(move |place| {
                let mut longer = order.clone();
                longer.insert(place, n - 1);
                longer
            })
        })
        .collect()
}

fn result(answer: &Answer) -> Value {
    answer.json()["result"].clone()
}
