//! Where an operator's commands find the database, and how what it refuses is said.

use crate::parts::postgres;
use anyhow::{Context, Result};
use clap::Args;
use serde_json::Value;
use tokio_postgres::{Client, Row};

/// Where the database is.
#[derive(Debug, Args)]
pub struct Place {
    /// The database, as its owner; what `cargo up` prints.
    #[arg(long, value_name = "URL", env = "DATABASE_URL", hide_env_values = true)]
    database_url: String,
}

impl Place {
    /// The database at this address.
    pub fn of(database_url: &str) -> Self {
        Self { database_url: database_url.to_owned() }
    }

    /// A connection as its owner.
    pub async fn connect(&self) -> Result<Client> {
        postgres::connect(&self.database_url).await.context("the database")
    }
}

/// The message of an error that the database raised for a client, or the error itself.
pub(super) fn said(error: tokio_postgres::Error) -> anyhow::Error {
    let told = error.as_db_error().and_then(|error| serde_json::from_str::<Value>(error.message()).ok());
    match told.as_ref().and_then(|told| told["message"].as_str()) {
        Some(message) => anyhow::anyhow!("{message}"),
        None => error.into(),
    }
}

/// Rows whose columns are all texts, as cells; null is empty.
pub(super) fn cells(rows: &[Row]) -> Vec<Vec<String>> {
    rows.iter()
        .map(|row| (0..row.len()).map(|column| row.get::<_, Option<String>>(column).unwrap_or_default()).collect())
        .collect()
}
