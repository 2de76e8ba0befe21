//! Billing: what the database's own functions say, the ones that the invoice run calls. Nothing is worked out here.

use super::text;
use crate::Database;
use anyhow::{Context, Result, bail, ensure};
use local::parts::postgres::Role;
use serde_json::Value;
use std::path::Path;
use tokio::runtime::{Builder, Runtime};
use tokio_postgres::{Client, error::DbError};

/// One operation: what it is given, what may be left out, and the query that answers it; `$1` is the input.
struct Operation {
    name: &'static str,
    needs: &'static [&'static str],
    may_have: &'static [&'static str],
    query: &'static str,
}

/// The tiers of the input as the database takes them: `[up_to, unit_price, flat]`, or without a flat fee.
macro_rules! tiers {
    () => {
        "(select array_agg(
            ((tier ->> 0)::numeric, (tier ->> 1)::numeric, coalesce((tier ->> 2)::bigint, 0))::private.price_tier order by place)
          from jsonb_array_elements(given -> 'tiers') with ordinality as listed (tier, place))"
    };
}

const OPERATIONS: &[Operation] = &[
    Operation {
        name: "tiers",
        needs: &["tiers", "qty"],
        may_have: &["flat_at_zero"],
        query: concat!(
            "select jsonb_build_object(
              'volume', private.rate_volume(tiers, (given ->> 'qty')::numeric, coalesce((given ->> 'flat_at_zero')::boolean, false)),
              'graduated', private.rate_graduated(tiers, (given ->> 'qty')::numeric, coalesce((given ->> 'flat_at_zero')::boolean, false)))
            from (select ",
            tiers!(),
            " as tiers) as priced"
        ),
    },
    Operation {
        name: "graduated",
        needs: &["tiers", "qty"],
        may_have: &["flat_at_zero"],
        query: concat!(
            "select to_jsonb(private.rate_graduated(",
            tiers!(),
            ", (given ->> 'qty')::numeric, coalesce((given ->> 'flat_at_zero')::boolean, false)))"
        ),
    },
    Operation {
        name: "package",
        needs: &["package", "price", "qty"],
        may_have: &["free"],
        query: "select to_jsonb(private.rate_package(
            (given ->> 'qty')::numeric, coalesce((given ->> 'free')::numeric, 0), (given ->> 'package')::numeric,
            (given ->> 'price')::bigint))",
    },
    Operation {
        name: "prorate",
        needs: &["amount", "num", "den"],
        may_have: &[],
        query: "select to_jsonb(private.prorate((given ->> 'amount')::bigint, (given ->> 'num')::numeric, (given ->> 'den')::numeric))",
    },
    Operation {
        name: "gst",
        needs: &["net", "intra", "rate_percent"],
        may_have: &[],
        query: "select jsonb_build_object(
              'cgst', cgst_minor, 'sgst', sgst_minor, 'igst', igst_minor,
              'total', (given ->> 'net')::bigint + cgst_minor + sgst_minor + igst_minor)
            from private.gst_amounts(
              (given ->> 'net')::bigint, (given ->> 'intra')::boolean, (given ->> 'rate_percent')::numeric * 100)",
    },
    Operation {
        name: "base_and_overage",
        needs: &["base", "included_s", "used_s", "paise_per_min", "tax_percent"],
        may_have: &[],
        query: "select jsonb_build_object(
              'overage_s', overage_units, 'subtotal', subtotal_minor, 'tax', tax_minor, 'total', total_minor)
            from private.rate_base_and_overage(
              (given ->> 'base')::bigint, (given ->> 'included_s')::numeric, (given ->> 'used_s')::numeric,
              (given ->> 'paise_per_min')::numeric, 60, (given ->> 'tax_percent')::numeric * 100)",
    },
    Operation {
        name: "allowance_then_graduated",
        needs: &["used_s", "included_s", "tiers"],
        may_have: &[],
        query: concat!(
            "select jsonb_build_object(
              'lines', to_jsonb(lines), 'total', (select sum(line) from unnest(lines) as line))
            from private.rate_beyond_allowance(",
            tiers!(),
            ", (given ->> 'used_s')::numeric, (given ->> 'included_s')::numeric, 60) as lines"
        ),
    },
    Operation {
        name: "allocate_largest_remainder",
        needs: &["total", "weights"],
        may_have: &[],
        query: "select to_jsonb(private.allocate_largest_remainder((given ->> 'total')::bigint, (
              select array_agg(weight::numeric order by place)
              from jsonb_array_elements_text(given -> 'weights') with ordinality as listed (weight, place))))",
    },
    Operation {
        name: "period_from_anchor",
        needs: &["anchor", "months"],
        may_have: &[],
        query: "select to_jsonb(private.period_boundary((given ->> 'anchor')::date, 'monthly', (given ->> 'months')::integer))",
    },
    Operation {
        name: "series_month",
        needs: &["instant", "time_zone"],
        may_have: &[],
        query: "select to_jsonb(private.series_month((given ->> 'instant')::timestamptz, given ->> 'time_zone'))",
    },
    Operation {
        name: "events_per_month",
        needs: &["instants", "time_zone"],
        may_have: &[],
        // Counted as usage is, and read from the days that are billed.
        query: "select jsonb_agg(events order by month)
            from (
              select date_trunc('month', total.day) as month, sum(total.quantity) as events
              from judged as one
              join public.usage_days as total on total.organization_id = one.id
              group by 1
            ) as counted",
    },
    Operation {
        name: "hours_in_period",
        needs: &["from", "to"],
        may_have: &[],
        query: "select to_jsonb(private.hours_in_period((given ->> 'from')::timestamptz, (given ->> 'to')::timestamptz))",
    },
    Operation {
        name: "pulse",
        needs: &["calls", "pulse_s"],
        may_have: &[],
        query: "select jsonb_build_object(
              'per_call_ceil', coalesce(sum(private.started_units(call::numeric, (given ->> 'pulse_s')::numeric)), 0),
              'sum_then_ceil', private.started_units(coalesce(sum(call::numeric), 0), (given ->> 'pulse_s')::numeric),
              'seconds', coalesce(sum(call::numeric), 0))
            from jsonb_array_elements_text(given -> 'calls') as call",
    },
];

/// An organization of one vector, in whose zone its instants are counted.
const COUNT: &str = "
    create temporary table judged on commit drop as select gen_random_uuid() as id;
    insert into public.organizations (id, name, timezone) select id, 'Judged', current_setting('judged.zone') from judged";
const COUNTED: &str = "
    select private.count_usage(
      (select id from judged), array_agg('vectors'::text), array_agg(place::text), array_agg('ai_calls'::text), array_agg(1::bigint),
      array_agg(instant), max(instant))
    from (
      select instant::timestamptz as instant, place
      from jsonb_array_elements_text($1::text::jsonb -> 'instants') with ordinality as listed (instant, place)
    ) as told";

/// A migrated database, to be asked.
pub struct Rating {
    runtime: Runtime,
    client: Client,
    _database: Database,
}

impl Rating {
    /// Starts one.
    pub fn start(supervisor: &Path) -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (database, client) = runtime.block_on(async {
            let database = Database::migrated(supervisor).await?;
            let client = database.connect(Role::Owner).await?;
            anyhow::Ok((database, client))
        })?;
        Ok(Self { runtime, client, _database: database })
    }

    /// Whether the database says what the vector expects.
    pub fn judge(&mut self, vector: &Value) -> Result<()> {
        let name = text(vector, "op")?;
        let operation = OPERATIONS.iter().find(|known| known.name == name);
        let operation = operation.with_context(|| format!("nobody knows the operation {name}"))?;
        let input = vector.get("input").context("it has no input")?;
        check_input(operation, input)?;
        let expected = vector.get("expected").filter(|value| !value.is_null()).context("it has no expected")?;
        let said = self.runtime.block_on(ask(&mut self.client, operation, input))?;
        ensure!(said == *expected, "{name} gives {said} and should give {expected}");
        Ok(())
    }
}

/// Only what the operation is known to take, all that it needs, and nothing that is a float.
fn check_input(operation: &Operation, input: &Value) -> Result<()> {
    let fields = input.as_object().context("its input is no object")?;
    for key in operation.needs {
        ensure!(fields.get(*key).is_some_and(|value| !value.is_null()), "its input has no {key}");
    }
    for key in fields.keys() {
        let known = operation.needs.contains(&key.as_str()) || operation.may_have.contains(&key.as_str());
        ensure!(known, "nobody knows {key} in the input of {}", operation.name);
    }
    check_numbers(input)
}

fn check_numbers(value: &Value) -> Result<()> {
    match value {
        Value::Number(number) if !number.is_i64() => bail!("{number} is no whole number; decimals are texts"),
        Value::Array(items) => items.iter().try_for_each(check_numbers),
        Value::Object(fields) => fields.values().try_for_each(check_numbers),
        _ => Ok(()),
    }
}

/// The database's answer; nothing of the question stays.
async fn ask(client: &mut Client, operation: &Operation, input: &Value) -> Result<Value> {
    let told = |error: tokio_postgres::Error| {
        let why = error.as_db_error().map(DbError::message).map_or_else(|| error.to_string(), str::to_owned);
        anyhow::anyhow!("the database refuses it: {why}")
    };
    let given = input.to_string();
    let transaction = client.transaction().await?;
    if operation.name == "events_per_month" {
        let zone = text(input, "time_zone")?;
        transaction.execute("select set_config('judged.zone', $1, true)", &[&zone]).await.map_err(told)?;
        transaction.batch_execute(COUNT).await.map_err(told)?;
        transaction.execute(COUNTED, &[&given]).await.map_err(told)?;
    }
    let query = format!("select ({})::text from (select $1::text::jsonb as given) as asked", operation.query);
    let answer: Option<String> = transaction.query_one(&query, &[&given]).await.map_err(told)?.get(0);
    transaction.rollback().await?;
    serde_json::from_str(&answer.context("the database has no answer")?).context("its answer")
}
