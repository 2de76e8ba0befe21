//! Test vectors: what others signed, rendered or rated, put through the code that the handlers use.
//!
//! A file's name says whose it is. A provider is a file here and a line in [`PROVIDERS`].

mod billing;
pub mod carriers;
mod elevenlabs;
mod retell;

use anyhow::{Context, Result, anyhow, bail, ensure};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::Value;
use shared::http::Request;
use std::{fs, path::Path};
use uuid::Uuid;
use webhook_intake::sources::{self, OpenSource};

/// Who judges the vectors of a file, one at a time: an error says what went wrong with it.
#[derive(Clone, Copy)]
enum Judge {
    /// A handler's code.
    Code(fn(&Value) -> Result<()>),
    /// The functions of the database, which is started for it.
    Database,
}

/// A judge with all that it needs.
type Ready = Box<dyn FnMut(&Value) -> Result<()>>;

/// Whose vectors a file holds, by its name without `.json`.
const PROVIDERS: &[(&str, Judge)] = &[
    ("billing", Judge::Database),
    ("elevenlabs", Judge::Code(elevenlabs::judge)),
    ("plivo", Judge::Code(carriers::judge_plivo)),
    ("retell", Judge::Code(retell::judge)),
    ("telnyx", Judge::Code(carriers::judge_telnyx)),
    ("twilio", Judge::Code(carriers::judge_twilio)),
    ("vonage", Judge::Code(carriers::judge_vonage)),
    ("xml_golden", Judge::Code(carriers::judge_golden)),
];

/// How it went.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Vectors that went as they say.
    pub passed: usize,
    /// A line for each one that did not.
    pub wrong: Vec<String>,
}

impl Outcome {
    /// Whether everything went as it should, and there was something.
    pub fn is_good(&self) -> bool {
        self.wrong.is_empty() && self.passed > 0
    }
}

/// Runs every vector of the JSON files in a folder. A file of a name or shape that is not known counts as one that went wrong.
///
/// `supervisor` is a binary that can be a [`crate::supervisor`]; it is started only for a file that needs a database. Not to be called
/// from asynchronous code.
pub fn run(folder: &Path, supervisor: &Path) -> Result<Outcome> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .collect();
    files.sort();
    ensure!(!files.is_empty(), "there is no JSON file in {}", folder.display());
    let mut outcome = Outcome::default();
    for file in &files {
        let name = file.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let ready = vectors_of(&name, file).and_then(|(judge, vectors)| Ok((judge.ready(supervisor)?, vectors)));
        match ready {
            Ok((mut judge, vectors)) => {
                for (index, vector) in vectors.iter().enumerate() {
                    match judge(vector) {
                        Ok(()) => outcome.passed += 1,
                        Err(error) => {
                            let id = vector["id"].as_str().map_or_else(|| format!("#{index}"), str::to_owned);
                            outcome.wrong.push(format!("{name}: {id}: {error:#}"));
                        }
                    }
                }
            }
            Err(error) => outcome.wrong.push(format!("{name}: {error:#}")),
        }
    }
    Ok(outcome)
}

impl Judge {
    fn ready(self, supervisor: &Path) -> Result<Ready> {
        Ok(match self {
            Self::Code(judge) => Box::new(judge),
            Self::Database => {
                let mut rating = billing::Rating::start(supervisor)?;
                Box::new(move |vector| rating.judge(vector))
            }
        })
    }
}

fn vectors_of(name: &str, file: &Path) -> Result<(Judge, Vec<Value>)> {
    let judge = PROVIDERS.iter().find(|(known, _)| *known == name).map(|(_, judge)| *judge);
    let judge = judge.ok_or_else(|| anyhow!("nobody knows vectors of this name"))?;
    let vectors: Vec<Value> = serde_json::from_slice(&fs::read(file)?).context("it is not a JSON array of vectors")?;
    ensure!(!vectors.is_empty(), "it holds no vector");
    Ok((judge, vectors))
}

/// A text that a vector must have.
fn text<'v>(vector: &'v Value, key: &str) -> Result<&'v str> {
    vector.get(key).and_then(Value::as_str).with_context(|| format!("it has no {key}"))
}

/// A whole number that a vector must have.
fn number(vector: &Value, key: &str) -> Result<i64> {
    vector.get(key).and_then(Value::as_i64).with_context(|| format!("it has no {key}"))
}

/// The request of a vector, as a handler is given it, and the URL that was called.
fn request_of(vector: &Value) -> Result<(Request, String)> {
    let url = text(vector, "url")?;
    let method: Method = text(vector, "method")?.parse().context("its method is none")?;
    let mut headers = HeaderMap::new();
    for (name, value) in vector.get("headers").and_then(Value::as_object).context("it has no headers")? {
        let value = value.as_str().with_context(|| format!("its header {name} is no text"))?;
        headers.append(HeaderName::try_from(name).context(name.clone())?, HeaderValue::from_str(value)?);
    }
    let below = url.split_once("://").map_or(url, |(_, rest)| rest);
    let below = below.find('/').map_or("/", |at| &below[at..]);
    let (path, query) = below.split_once('?').unwrap_or((below, ""));
    let body = vector.get("body").and_then(Value::as_str).unwrap_or_default().as_bytes().to_vec();
    let request = Request { method, path: path.to_owned(), query: query.to_owned(), headers, body: body.into() };
    Ok((request, url.to_owned()))
}

/// Compares a verdict with the one that is wanted.
fn compare(vector: &Value, accepted: bool) -> Result<()> {
    let wanted = vector.get("valid").and_then(Value::as_bool).context("it says not whether it is valid")?;
    if accepted == wanted {
        return Ok(());
    }
    bail!(
        "{} and should be {}",
        if accepted { "accepted" } else { "refused" },
        if wanted { "accepted" } else { "refused" }
    )
}

/// Asks a source of the table in the handler for its verdict.
fn source_verdict(name: &str, vector: &Value, settings: Value, now_ms: i64) -> Result<()> {
    let source = sources::find(name).with_context(|| format!("there is no source {name}"))?;
    let (request, _) = request_of(vector)?;
    let open = OpenSource {
        id: Uuid::nil(),
        provider: name.to_owned(),
        organization_id: None,
        store_id: None,
        settings,
        secrets: vec![text(vector, "secret")?.to_owned()],
    };
    compare(vector, source.verify(&open, &request, now_ms))
}
