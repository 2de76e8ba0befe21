//! What the database says: read as its administrator, at the side of the story and not through it.

use anyhow::{Context, Result};
use chrono::{DateTime, Utc};
use std::collections::BTreeMap;
use tokio_postgres::Client;
use uuid::Uuid;

/// States in which a lead of a campaign stays.
const TERMINAL: &str = "('called', 'failed', 'opted_out', 'skipped', 'archived')";

/// How far a campaign is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Leads of the campaign.
    pub leads: i64,
    /// Of them, those in a state in which they stay.
    pub terminal: i64,
    /// Attempts that have not ended.
    pub open: i64,
    /// Attempts that the carrier was asked to dial.
    pub dials: i64,
    /// How attempts ended.
    pub outcomes: BTreeMap<String, i64>,
    /// State of the campaign.
    pub status: String,
    /// What leads wait for.
    pub waiting: BTreeMap<String, i64>,
}

/// Reads how far a campaign is.
pub async fn standing(database: &Client, campaign: Uuid) -> Result<Standing> {
    let counts = format!(
        "select \
           (select count(*) from public.campaign_leads where campaign_id = $1), \
           (select count(*) from public.campaign_leads where campaign_id = $1 and status in {TERMINAL}), \
           (select count(*) from public.call_logs where campaign_id = $1 and status <> 'ended'), \
           (select count(*) from public.call_logs where campaign_id = $1 and dialled), \
           (select status::text from public.campaigns where id = $1)"
    );
    let row = database.query_one(counts.as_str(), &[&campaign]).await.context("how far the campaign is")?;
    let outcomes = "select call_status::text, count(*) from public.call_logs \
                    where campaign_id = $1 and call_status is not null group by 1";
    let waiting = "select coalesce(wait_reason, 'ready'), count(*) from public.call_queue \
                   where campaign_id = $1 and status = 'queued' group by 1";
    Ok(Standing {
        leads: row.get(0),
        terminal: row.get(1),
        open: row.get(2),
        dials: row.get(3),
        status: row.get(4),
        outcomes: grouped(database, outcomes, campaign).await?,
        waiting: grouped(database, waiting, campaign).await?,
    })
}

/// Dialled attempts by their number: how many first ones, second ones and so on.
pub async fn attempts(database: &Client, campaign: Uuid) -> Result<BTreeMap<i32, i64>> {
    // Numbered anew: attempts that were never dialled have numbers too.
    let attempts = "select dial.number::integer, count(*) from ( \
                      select row_number() over (partition by lead_id order by submitted_at) as number \
                      from public.call_logs where campaign_id = $1 and dialled \
                    ) as dial group by 1";
    let attempts = database.query(attempts, &[&campaign]).await?;
    Ok(attempts.iter().map(|row| (row.get(0), row.get(1))).collect())
}

async fn grouped(database: &Client, sql: &str, id: Uuid) -> Result<BTreeMap<String, i64>> {
    let rows = database.query(sql, &[&id]).await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// One line of an invoice.
#[derive(Clone, Debug)]
pub struct Line {
    /// What it is for.
    pub description: String,
    /// `base`, `included` or `overage`.
    pub kind: String,
    /// The meter, where it is about one.
    pub meter: Option<String>,
    /// Units.
    pub quantity: i64,
    /// Name of the unit.
    pub unit: String,
    /// Price of [`Self::price_units`] units, in the currency's minor unit.
    pub unit_price_minor: i64,
    /// How many units the price is for.
    pub price_units: i64,
    /// In the currency's minor unit.
    pub amount_minor: i64,
}

/// One component of an invoice's tax.
#[derive(Clone, Debug)]
pub struct Tax {
    /// `IGST`, say.
    pub name: String,
    /// Hundredths of a percent.
    pub rate_bp: i32,
    /// In the currency's minor unit.
    pub amount_minor: i64,
}

/// An invoice as it stands in the database. Amounts are in the currency's minor unit.
#[derive(Clone, Debug)]
pub struct Invoice {
    /// Its id.
    pub id: Uuid,
    /// Its number.
    pub number: String,
    /// ISO code.
    pub currency: String,
    /// The day it was made.
    pub date: chrono::NaiveDate,
    /// The day it is to be paid by.
    pub due: chrono::NaiveDate,
    /// Sum before tax.
    pub subtotal_minor: i64,
    /// Sum of the taxes.
    pub tax_minor: i64,
    /// What is to be paid.
    pub total_minor: i64,
    /// Its lines, in order.
    pub lines: Vec<Line>,
    /// Its taxes, in order.
    pub taxes: Vec<Tax>,
}

/// The organization's invoices, oldest first.
pub async fn invoices(database: &Client, organization: Uuid) -> Result<Vec<Invoice>> {
    let rows = database
        .query(
            "select id, coalesce(invoice_number, ''), currency, invoice_date, due_date, subtotal_minor, tax_minor, total_minor \
             from public.invoices where organization_id = $1 and status <> 'draft' order by period_start",
            &[&organization],
        )
        .await?;
    let mut invoices = Vec::new();
    for row in rows {
        let id: Uuid = row.get(0);
        let lines = database
            .query(
                "select description, kind, meter_key, quantity, unit, unit_price_minor, price_units, amount_minor \
                 from public.invoice_lines where invoice_id = $1 order by position",
                &[&id],
            )
            .await?;
        let taxes = database
            .query(
                "select name, rate_bp, amount_minor from public.invoice_taxes where invoice_id = $1 order by position",
                &[&id],
            )
            .await?;
        invoices.push(Invoice {
            id,
            number: row.get(1),
            currency: row.get(2),
            date: row.get(3),
            due: row.get(4),
            subtotal_minor: row.get(5),
            tax_minor: row.get(6),
            total_minor: row.get(7),
            lines: lines
                .iter()
                .map(|line| Line {
                    description: line.get(0),
                    kind: line.get(1),
                    meter: line.get(2),
                    quantity: line.get(3),
                    unit: line.get(4),
                    unit_price_minor: line.get(5),
                    price_units: line.get(6),
                    amount_minor: line.get(7),
                })
                .collect(),
            taxes: taxes
                .iter()
                .map(|tax| Tax { name: tax.get(0), rate_bp: tax.get(1), amount_minor: tax.get(2) })
                .collect(),
        });
    }
    Ok(invoices)
}

/// What the plan of a subscription says about calling time. Prices are in the currency's minor unit.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Price of the period.
    pub base_minor: i64,
    /// Seconds that it includes.
    pub included_seconds: i64,
    /// Price of [`Self::overage_unit`] seconds beyond them.
    pub overage_price_minor: i64,
    /// Seconds that the overage price is for.
    pub overage_unit: i64,
}

/// What was used, by each of the three ways in which it is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Sum of the events.
    pub events: i64,
    /// Sum of the days.
    pub days: i64,
    /// Sum of the periods' counters.
    pub counter: i64,
}

/// What is left to know at the end.
#[derive(Clone, Debug)]
pub struct Books {
    /// Leads that were imported.
    pub leads: i64,
    /// Calls counted.
    pub calls: Used,
    /// Seconds counted.
    pub seconds: Used,
    /// Seconds billed by the carrier, as the attempts have them.
    pub attempt_seconds: i64,
    /// Units still held for calls.
    pub reserved: i64,
    /// Terms of the plan.
    pub terms: Terms,
    /// Events from outside that were not applied, by state.
    pub unapplied_events: BTreeMap<String, i64>,
}

/// Reads what the organization's books say.
pub async fn books(database: &Client, organization: Uuid, plan: &str) -> Result<Books> {
    let used = async |meter: &str| -> Result<Used> {
        let row = database
            .query_one(
                "select \
                   (select coalesce(sum(quantity), 0)::bigint from private.usage_events where organization_id = $1 and meter_key = $2), \
                   (select coalesce(sum(quantity), 0)::bigint from public.usage_days where organization_id = $1 and meter_key = $2), \
                   (select coalesce(sum(usage_count), 0)::bigint from public.usage_logs where organization_id = $1 and feature_key = $2)",
                &[&organization, &meter],
            )
            .await?;
        Ok(Used { events: row.get(0), days: row.get(1), counter: row.get(2) })
    };
    let row = database
        .query_one(
            "select \
               (select count(*) from public.leads where organization_id = $1), \
               (select coalesce(sum(bill_duration_seconds), 0)::bigint from public.call_logs where organization_id = $1), \
               (select coalesce(sum(reserved), 0)::bigint from public.usage_logs where organization_id = $1)",
            &[&organization],
        )
        .await?;
    let terms = database
        .query_one(
            "select price.base_minor, term.included_units, term.overage_price_minor, term.overage_unit \
             from public.subscription_plans as plan \
             join public.plan_prices as price on price.plan_id = plan.id \
             join public.plan_price_meters as term on term.plan_price_id = price.id and term.meter_key = 'call_seconds' \
             where plan.slug = $1",
            &[&plan],
        )
        .await
        .context("the demo's plan")?;
    let unapplied = database
        .query(
            "select status::text, count(*) from private.webhook_events where status in ('failed', 'orphan', 'dead') group by 1",
            &[],
        )
        .await?;
    Ok(Books {
        leads: row.get(0),
        calls: used("ai_calls").await?,
        seconds: used("call_seconds").await?,
        attempt_seconds: row.get(1),
        reserved: row.get(2),
        terms: Terms {
            base_minor: terms.get(0),
            included_seconds: terms.get(1),
            overage_price_minor: terms.get(2),
            overage_unit: terms.get(3),
        },
        unapplied_events: unapplied.iter().map(|row| (row.get(0), row.get(1))).collect(),
    })
}

/// When the period ends that the organization's subscription is in.
pub async fn period_end(database: &Client, organization: Uuid) -> Result<DateTime<Utc>> {
    let row = database
        .query_one(
            "select current_period_end from public.subscriptions where organization_id = $1 and status not in ('cancelled', 'inactive')",
            &[&organization],
        )
        .await
        .context("the organization's subscription")?;
    Ok(row.get(0))
}
