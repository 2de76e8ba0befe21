//! `rates`: price lists of calls and exchange rates from files, and what calls leave, as CSV. The database's functions decide.

use super::database::{Place, said};
use anyhow::{Context, Result, ensure};
use chrono::NaiveDate;
use clap::{Subcommand, ValueEnum};
use serde::Deserialize;
use serde_json::{Value, json};
use shared::telephony::micros;
use std::path::{Path, PathBuf};

/// What to do with rates.
#[derive(Debug, Subcommand)]
pub enum Rates {
    /// Load a version of a rate deck: a CSV of prefix, destination, price (a minute; empty is not sold), and, where they are, connection,
    /// minimum and pulses (`60/60`, `30/6`; `1/1` without).
    Load {
        /// The CSV.
        file: PathBuf,
        /// The deck's name, like retail.
        #[arg(long)]
        deck: String,
        /// Whether organizations pay these prices, or a carrier asks them.
        #[arg(long, value_enum, default_value_t = Kind::Sell)]
        kind: Kind,
        /// ISO 4217.
        #[arg(long)]
        currency: String,
        /// Since when it holds, RFC 3339.
        #[arg(long, value_name = "TIME")]
        from: String,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// Load exchange rates: a CSV of from, to, day and rate.
    Exchange {
        /// The CSV.
        file: PathBuf,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// What calls brought and cost, the worst first, as CSV.
    Margin {
        /// By what.
        #[arg(long, value_enum, default_value_t = By::Organization)]
        by: By,
        /// Of calls that ended since then, RFC 3339.
        #[arg(long, value_name = "TIME")]
        from: String,
        /// Until before then, RFC 3339.
        #[arg(long, value_name = "TIME")]
        to: String,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
}

/// Who pays the prices of a deck.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum Kind {
    /// Organizations.
    Sell,
    /// We, to a carrier.
    Cost,
}

/// What a margin is told by.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum By {
    /// Each organization.
    Organization,
    /// Each campaign.
    Campaign,
    /// Each destination of the deck, else each country.
    Destination,
}

#[derive(Debug, Deserialize)]
struct Line {
    prefix: String,
    destination: String,
    #[serde(default)]
    price: String,
    #[serde(default)]
    connection: String,
    #[serde(default)]
    minimum: String,
    #[serde(default)]
    pulses: String,
}

#[derive(Debug, Deserialize)]
struct Exchanged {
    from: String,
    to: String,
    day: NaiveDate,
    rate: String,
}

/// Does it, and says what to print.
pub async fn run(command: &Rates) -> Result<String> {
    match command {
        Rates::Load { file, deck, kind, currency, from, place } => {
            let kind = if matches!(kind, Kind::Sell) { "sell" } else { "cost" };
            let rates = Value::from(deck_of(&std::fs::read_to_string(file).with_context(|| shown(file))?)?);
            let client = place.connect().await?;
            let set = "select private.set_rates($1, $2, $3, $4::text::timestamptz, $5, private.clock_now())";
            let row = client.query_one(set, &[deck, &kind, currency, from, &rates]).await.map_err(said)?;
            let answer: Value = row.try_get(0)?;
            let told = if answer["result"] == "unchanged" { "is already" } else { "is now" };
            Ok(format!("version {} of {deck} {told} {} prices\n", answer["version"], answer["rates"]))
        }
        Rates::Exchange { file, place } => {
            let mut reader = csv::Reader::from_path(file).with_context(|| shown(file))?;
            let client = place.connect().await?;
            let set = "select private.set_exchange_rate($1, $2, $3, $4::text::numeric, private.clock_now())";
            let (mut loaded, mut converted) = (0, 0);
            for line in reader.deserialize() {
                let line: Exchanged = line?;
                let row = client.query_one(set, &[&line.from, &line.to, &line.day, &line.rate]).await.map_err(said)?;
                converted += row.try_get::<_, i64>(0)?;
                loaded += 1;
            }
            Ok(format!("{loaded} exchange rates, {converted} costs waited for them\n"))
        }
        Rates::Margin { by, from, to, place } => {
            let by = by.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
            let client = place.connect().await?;
            let ask =
                "select to_jsonb(line) from private.margin($1, $2::text::timestamptz, $3::text::timestamptz) as line";
            let rows = client.query(ask, &[&by, from, to]).await.map_err(said)?;
            sheet(&rows.iter().map(|row| row.try_get(0)).collect::<Result<Vec<Value>, _>>()?)
        }
    }
}

fn shown(file: &Path) -> String {
    file.display().to_string()
}

/// The prices of a CSV in the words of `set_rates`.
fn deck_of(text: &str) -> Result<Vec<Value>> {
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(text.as_bytes());
    let mut rates = Vec::new();
    for (number, line) in reader.deserialize().enumerate() {
        let line: Line = line?;
        let amount = |told: &str| -> Result<Option<i64>> {
            if told.is_empty() {
                return Ok(None);
            }
            // More decimals than are kept would be another price.
            let whole = told.split_once('.').is_none_or(|(_, fraction)| fraction.trim_end_matches('0').len() <= 6);
            let micros = micros(told).filter(|micros| whole && *micros >= 0);
            micros.map(Some).with_context(|| format!("line {}: {told} is no price", number + 2))
        };
        let (first, next) = line.pulses.split_once('/').unwrap_or(("1", "1"));
        let pulse = |told: &str| {
            let seconds = told.trim().parse::<i32>().ok().filter(|seconds| *seconds > 0);
            seconds.with_context(|| format!("line {}: {} are no pulses", number + 2, line.pulses))
        };
        ensure!(
            line.pulses.is_empty() || line.pulses.contains('/'),
            "line {}: {} are no pulses",
            number + 2,
            line.pulses
        );
        rates.push(json!({
            "prefix": format!("+{}", line.prefix.trim_start_matches('+')),
            "destination": line.destination,
            "price_micros": amount(&line.price)?,
            "connection_micros": amount(&line.connection)?,
            "minimum_micros": amount(&line.minimum)?,
            "initial_pulse": pulse(first)?,
            "next_pulse": pulse(next)?,
        }));
    }
    Ok(rates)
}

/// The columns of a margin's CSV.
const COLUMNS: [&str; 15] = [
    "key",
    "name",
    "currency",
    "calls",
    "seconds",
    "revenue",
    "carrier_cost",
    "agent_cost",
    "margin",
    "margin_percent",
    "invoiced",
    "without_rate",
    "without_cost",
    "without_exchange",
    "estimated",
];

fn sheet(rows: &[Value]) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record(COLUMNS)?;
    for row in rows {
        writer.write_record(COLUMNS.map(|column| match &row[column] {
            Value::Null => String::new(),
            // A name that a spreadsheet would take for a formula is kept from being one.
            Value::String(text) if text.starts_with(['=', '+', '-', '@', '\t', '\r']) => format!("'{text}"),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deck_is_read_as_it_is_written() {
        let deck = "prefix,destination,price,connection,minimum,pulses\n91,India,0.60,,,60/60\n+1900,Premium,,,,\n44, UK ,0.0123,0.01,0.02,30/6\n";
        let rates = deck_of(deck).unwrap();
        assert_eq!(
            rates[0],
            json!({"prefix": "+91", "destination": "India", "price_micros": 600_000, "connection_micros": null, "minimum_micros": null,
                "initial_pulse": 60, "next_pulse": 60})
        );
        assert_eq!((&rates[1]["price_micros"], &rates[1]["initial_pulse"]), (&Value::Null, &json!(1)));
        assert_eq!(
            rates[2],
            json!({"prefix": "+44", "destination": "UK", "price_micros": 12_300, "connection_micros": 10_000, "minimum_micros": 20_000,
                "initial_pulse": 30, "next_pulse": 6})
        );
    }

    #[test]
    fn what_is_no_price_or_pulse_is_named_by_its_line() {
        for (line, told) in [
            ("91,India,cheap,,,", "line 2: cheap is no price"),
            ("91,India,-1,,,", "line 2: -1 is no price"),
            ("91,India,0.00000001,,,", "line 2: 0.00000001 is no price"),
            ("91,India,1,,,60", "line 2: 60 are no pulses"),
            ("91,India,1,,,0/1", "line 2: 0/1 are no pulses"),
        ] {
            let deck = format!("prefix,destination,price,connection,minimum,pulses\n{line}\n");
            assert_eq!(deck_of(&deck).unwrap_err().to_string(), told);
        }
        assert_eq!(deck_of("prefix,destination,price\n1,US,0.0100000\n").unwrap()[0]["price_micros"], 10_000);
    }

    #[test]
    fn a_margin_is_a_sheet_without_formulas() {
        let sheet = sheet(&[json!({"key": "k", "name": "=1+1", "calls": 2, "margin": -1.5})]).unwrap();
        assert_eq!(sheet.lines().nth(1), Some("k,'=1+1,,2,,,,,-1.5,,,,,,"));
    }
}
