//! `events`: what came in from outside, and what became of it. The database's functions decide; here they are asked and shown.

use super::{
    database::{Place, said},
    table,
};
use anyhow::{Context, Result, ensure};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use uuid::Uuid;

/// What to do with events.
#[derive(Debug, Subcommand)]
pub enum Events {
    /// List events, latest first.
    List {
        /// Which events.
        #[command(flatten)]
        filter: Filter,
        /// How many at most.
        #[arg(long, default_value_t = 50)]
        limit: u32,
        /// Continue a list: the id that it ended with.
        #[arg(long, value_name = "ID")]
        before: Option<Uuid>,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// Show one event whole, with what it carried.
    Show {
        /// The event's id.
        id: Uuid,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// Count events by source and status, and the words of providers that nobody has mapped.
    Count {
        /// Only of this organization.
        #[arg(long, value_name = "ID")]
        organization: Option<Uuid>,
        /// Since then, RFC 3339 [default: seven days ago]
        #[arg(long, value_name = "TIME")]
        since: Option<String>,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
    /// Have failed and dead events applied again at the next sweep: these, or all that match.
    Redrive {
        /// Ids of events.
        ids: Vec<Uuid>,
        /// Which events.
        #[command(flatten)]
        filter: Filter,
        /// Where they are.
        #[command(flatten)]
        place: Place,
    },
}

/// Which events are meant.
#[derive(Debug, Default, Args)]
pub struct Filter {
    /// Of this organization.
    #[arg(long, value_name = "ID")]
    organization: Option<Uuid>,
    /// From this source, like plivo.
    #[arg(long)]
    source: Option<String>,
    /// From this account or source, by its id.
    #[arg(long, value_name = "ID")]
    source_id: Option<Uuid>,
    /// Of this kind, like hangup.
    #[arg(long)]
    kind: Option<String>,
    /// Of these states: applied, ignored, orphan, failed, dead; several by comma.
    #[arg(long)]
    status: Option<String>,
    /// About this attempt.
    #[arg(long, value_name = "ID")]
    attempt: Option<Uuid>,
    /// Since then, RFC 3339.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Until before then, RFC 3339.
    #[arg(long, value_name = "TIME")]
    until: Option<String>,
}

impl Filter {
    fn request(&self) -> Map<String, Value> {
        let id = |id: Option<Uuid>| id.map(|id| id.to_string());
        [
            ("organization_id", id(self.organization)),
            ("source", self.source.clone()),
            ("source_id", id(self.source_id)),
            ("kind", self.kind.clone()),
            ("status", self.status.clone()),
            ("attempt_id", id(self.attempt)),
            ("since", self.since.clone()),
            ("until", self.until.clone()),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), json!(value?))))
        .collect()
    }
}

/// Does it, and says what to print.
pub async fn run(command: &Events) -> Result<String> {
    match command {
        Events::List { filter, limit, before, place } => {
            let mut request = filter.request();
            request.insert("limit".to_owned(), json!(limit));
            if let Some(before) = before {
                request.insert("before".to_owned(), json!(before));
            }
            Ok(listed(&ask(place, "list_events", request).await?))
        }
        Events::Show { id, place } => {
            let event = ask(place, "get_event", Map::from_iter([("id".to_owned(), json!(id))])).await?;
            Ok(serde_json::to_string_pretty(&event)? + "\n")
        }
        Events::Count { organization, since, place } => {
            let filter = Filter { organization: *organization, since: since.clone(), ..Filter::default() };
            Ok(counted(&ask(place, "count_events", filter.request()).await?))
        }
        Events::Redrive { ids, filter, place } => {
            let mut request = filter.request();
            ensure!(ids.is_empty() != request.is_empty(), "name either events or a filter");
            if !ids.is_empty() {
                request.insert("ids".to_owned(), json!(ids));
            }
            let answer = ask(place, "redrive_events", request).await?;
            Ok(format!("{} events are due again; the next sweep applies them\n", answer["redriven"]))
        }
    }
}

async fn ask(place: &Place, function: &str, request: Map<String, Value>) -> Result<Value> {
    let client = place.connect().await?;
    let request = Value::Object(Map::from_iter([("v".to_owned(), json!(1))]).into_iter().chain(request).collect());
    let row = client.query_one(&format!("select public.{function}($1)"), &[&request]).await.map_err(said)?;
    row.try_get(0).with_context(|| format!("{function} has another shape"))
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A time to the second.
fn time(value: &Value) -> String {
    text(value).chars().take(19).collect::<String>().replace('T', " ")
}

fn listed(answer: &Value) -> String {
    let rows: Vec<Vec<String>> = answer["events"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|event| {
            let cells =
                ["id", "source", "kind", "status", "tries", "attempt_id", "error"].map(|name| text(&event[name]));
            std::iter::once(time(&event["received_at"])).chain(cells).collect()
        })
        .collect();
    let mut page = table(&["received", "id", "source", "kind", "status", "tries", "attempt", "error"], &rows);
    if let Some(before) = answer["before"].as_str() {
        page += &format!("more: --before {before}\n");
    }
    page
}

fn counted(answer: &Value) -> String {
    let rows = |list: &Value, names: &[&str]| -> Vec<Vec<String>> {
        let cells = |row: &Value| {
            names.iter().map(|name| if name.ends_with("est") { time(&row[*name]) } else { text(&row[*name]) }).collect()
        };
        list.as_array().into_iter().flatten().map(cells).collect()
    };
    let names = ["source", "status", "events", "oldest", "latest"];
    let mut page = table(&names, &rows(&answer["events"], &names));
    let unmapped = rows(&answer["unmapped"], &["source", "field", "value", "seen"]);
    if !unmapped.is_empty() {
        page +=
            &format!("\nWords that nobody has mapped:\n{}", table(&["source", "field", "value", "seen"], &unmapped));
    }
    page
}
