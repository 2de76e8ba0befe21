//! `restored`: what an operator does after a backup was restored. Dialling stops at once; carriers are asked for their calls since the
//! backup, and the series of numbers are taken past the archive's; then dialling may go on.

use super::{
    database::{Place, said},
    table,
};
use anyhow::{Result, bail};
use chrono::{DateTime, Utc};
use clap::Args;
use serde_json::Value;

/// What is known of the backup and of the time since. Without an option: how far it is.
#[derive(Debug, Args)]
pub struct Restored {
    /// The backup's time, RFC 3339: stops all dialling, and has the carriers asked for their calls since then.
    #[arg(long, value_name = "TIME")]
    since: Option<DateTime<Utc>>,
    /// The highest invoice number of the archive; once for each month since the backup.
    #[arg(long = "invoice", value_name = "NUMBER")]
    invoices: Vec<String>,
    /// No invoice was made since the backup.
    #[arg(long, conflicts_with = "invoices")]
    no_invoices: bool,
    /// The highest credit note number of the archive; once for each month since the backup.
    #[arg(long = "credit-note", value_name = "NUMBER")]
    credit_notes: Vec<String>,
    /// No credit note was made since the backup.
    #[arg(long, conflicts_with = "credit_notes")]
    no_credit_notes: bool,
    /// Let dialling go on, if all is known; otherwise says what is not.
    #[arg(long)]
    finish: bool,
    /// Where the database is.
    #[command(flatten)]
    place: Place,
}

impl Restored {
    /// Looks at the restore that is open in the database at `database_url`; the fields say what else is done.
    pub fn of(database_url: &str) -> Self {
        Self {
            since: None,
            invoices: Vec::new(),
            no_invoices: false,
            credit_notes: Vec::new(),
            no_credit_notes: false,
            finish: false,
            place: Place::of(database_url),
        }
    }

    /// Begins, with a backup of this time.
    #[must_use]
    pub fn since(mut self, time: DateTime<Utc>) -> Self {
        self.since = Some(time);
        self
    }

    /// With the highest invoice numbers of the archive, and no credit note in it.
    #[must_use]
    pub fn archive(mut self, invoices: &[&str]) -> Self {
        self.invoices = invoices.iter().map(|number| (*number).to_owned()).collect();
        self.no_invoices = invoices.is_empty();
        self.no_credit_notes = true;
        self
    }

    /// Finishes.
    #[must_use]
    pub fn finish(mut self) -> Self {
        self.finish = true;
        self
    }
}

/// Does it, and says what to print.
pub async fn run(command: &Restored) -> Result<String> {
    let client = command.place.connect().await?;
    if let Some(since) = command.since {
        client.execute("select private.begin_restore($1)", &[&since]).await.map_err(said)?;
    }
    // None says nothing; an empty list says that there are none.
    let list = |given: &Vec<String>, none: bool| (none || !given.is_empty()).then(|| given.clone());
    let invoices = list(&command.invoices, command.no_invoices);
    let credit_notes = list(&command.credit_notes, command.no_credit_notes);
    if invoices.is_some() || credit_notes.is_some() {
        client.execute("select private.see_archive($1, $2)", &[&invoices, &credit_notes]).await.map_err(said)?;
    }
    if command.finish {
        let row = client.query_one("select private.finish_restore()", &[]).await.map_err(said)?;
        return Ok(format!("{}the restore is finished: dialling is what it was in the backup\n", shown(&row.get(0))));
    }
    let state: Option<Value> = client.query_one("select private.restore_state()", &[]).await?.get(0);
    match state {
        Some(state) => Ok(shown(&state)),
        None => bail!("no restore is open; begin with --since"),
    }
}

fn shown(state: &Value) -> String {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
    let known = |flag: &Value| if flag == true { "known" } else { "not known yet" };
    let rows: Vec<Vec<String>> = state["accounts"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|account| {
            let read = if account["done"] == true { "to its end" } else { "not to its end yet" };
            vec![
                text(&account["carrier_account_id"]),
                text(&account["provider"]),
                text(&account["calls_booked"]),
                read.to_owned(),
            ]
        })
        .collect();
    format!(
        "backup of {}; calls under way then are over by {}\ninvoice numbers since: {}; credit note numbers since: {}; calls without an end: {}\n\n{}",
        text(&state["since"]),
        text(&state["settles_at"]),
        known(&state["invoices_seen"]),
        known(&state["credits_seen"]),
        state["open_calls"],
        table(&["account", "carrier", "calls booked", "read"], &rows)
    )
}
