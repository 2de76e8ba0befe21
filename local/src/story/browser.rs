//! A signed-in user in front of the API: every request as `@supabase/supabase-js` sends it.

use anyhow::{Context, Result, bail};
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::Value;
use std::time::Duration;
use url::Url;

/// How long a user waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A user's session.
#[derive(Clone)]
pub struct Browser {
    http: reqwest::Client,
    origin: Url,
    publishable_key: String,
    jwt: String,
}

impl Browser {
    /// A session of the user with this token.
    pub fn new(http: reqwest::Client, origin: Url, publishable_key: &str, jwt: &str) -> Self {
        Self { http, origin, publishable_key: publishable_key.to_owned(), jwt: jwt.to_owned() }
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder> {
        let url = self.origin.join(path).with_context(|| format!("{path} is no path"))?;
        let request = self.http.request(method, url).timeout(PATIENCE);
        Ok(request.header("apikey", &self.publishable_key).bearer_auth(&self.jwt))
    }

    /// `GET` below the origin, as JSON. Fails with what was answered.
    pub async fn get(&self, path: &str) -> Result<Value> {
        answer(path, self.request(Method::GET, path)?).await
    }

    /// `GET` below the origin, as the page that a browser would show.
    pub async fn page(&self, path: &str) -> Result<String> {
        let (status, text) = send(path, self.request(Method::GET, path)?.header("accept", "text/html")).await?;
        if !status.is_success() {
            bail!("GET {path}: {status} {text}");
        }
        Ok(text)
    }

    /// `POST` below the origin with a JSON body.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value> {
        answer(path, self.request(Method::POST, path)?.json(body)).await
    }

    /// `PATCH` below the origin with a JSON body.
    pub async fn patch(&self, path: &str, body: &Value) -> Result<Value> {
        answer(path, self.request(Method::PATCH, path)?.json(body)).await
    }

    /// Inserts one row and gives it back, as `supabase.from(table).insert(row).select().single()`.
    pub async fn insert(&self, table: &str, row: &Value) -> Result<Value> {
        let path = format!("rest/v1/{table}?select=*");
        let request = self.request(Method::POST, &path)?.header("prefer", "return=representation");
        answer(&path, request.header("accept", "application/vnd.pgrst.object+json").json(row)).await
    }

    /// Imports a CSV into a table.
    pub async fn import(&self, table: &str, csv: String) -> Result<()> {
        let path = format!("rest/v1/{table}");
        let request = self.request(Method::POST, &path)?.header("prefer", "return=minimal");
        answer(&path, request.header("content-type", "text/csv").body(csv)).await?;
        Ok(())
    }
}

async fn send(path: &str, request: RequestBuilder) -> Result<(StatusCode, String)> {
    let response = request.send().await.with_context(|| format!("the API does not answer at {path}"))?;
    let status = response.status();
    Ok((status, response.text().await?))
}

async fn answer(path: &str, request: RequestBuilder) -> Result<Value> {
    let (status, text) = send(path, request).await?;
    if !status.is_success() {
        bail!("{path}: {status} {text}");
    }
    if text.is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).with_context(|| format!("{path} answered with what is no JSON: {text}"))
}
