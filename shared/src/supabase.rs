//! Supabase over PostgREST: as the service, or as the caller.
//!
//! The `postgrest` crate builds the query; the one current `reqwest` client of the function sends it. No other file may know which
//! client is below.

use crate::{
    Error, Result,
    config::Config,
    metrics::{self, Metric},
    secrets::SecretStore,
};
use postgrest::Postgrest;
use serde::{Serialize, de::DeserializeOwned};
use std::time::{Duration, Instant};

/// How long to wait for a connection, in milliseconds.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1_000);
/// How long a request may take in all; Supabase's own statement timeout is 8 s.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The HTTP client of a function: built once, one TLS stack, bundled roots (loading the system's costs most of a cold start).
pub fn http_client() -> Result<reqwest::Client> {
    http_client_with(|builder| builder)
}

/// As [`http_client`], with other settings on top: for a client that speaks to others than our own services.
pub fn http_client_with(
    settings: impl FnOnce(reqwest::ClientBuilder) -> reqwest::ClientBuilder,
) -> Result<reqwest::Client> {
    // A second installation in one process, as tests do, keeps the first.
    let _already = rustls::crypto::ring::default_provider().install_default();
    let roots = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect::<rustls::RootCertStore>();
    let tls = rustls::ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    let builder = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        // Secret keys are refused when the User-Agent looks like a browser's.
        .user_agent(concat!("trunkline/", env!("CARGO_PKG_VERSION")))
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(TIMEOUT)
        .redirect(reqwest::redirect::Policy::none())
        // Whether to send again is the sender's to know: a call that was asked for must not be asked for twice.
        .retry(reqwest::retry::never());
    settings(builder).build().map_err(|error| Error::internal(format!("the HTTP client cannot be built: {error}")))
}

/// Who a request is made for.
#[derive(Clone, Copy)]
enum As<'a> {
    Service,
    User(&'a str),
}

/// A client of one Supabase project.
#[derive(Clone)]
pub struct Supabase {
    http: reqwest::Client,
    rest: Postgrest,
    publishable_key: String,
    secrets: SecretStore,
}

/// A query with the `postgrest` crate's builder: `client.from("invoices").select("*").eq("id", id)`.
pub type Query = postgrest::Builder;

impl Supabase {
    /// A client for the project that `config` names, sending through `http`.
    pub fn new(config: &Config, http: reqwest::Client, secrets: SecretStore) -> Self {
        let url = format!("{}/rest/v1", config.supabase_url.as_str().trim_end_matches('/'));
        Self { http, rest: Postgrest::new(url), publishable_key: config.publishable_key.clone(), secrets }
    }

    /// Starts a query on a table or view.
    pub fn from(&self, table: &str) -> Query {
        self.rest.from(table)
    }

    /// Calls a database function of the handlers (`public.<verb>_<noun>(jsonb)`) with the secret key. One request, not repeated.
    pub async fn call<T: DeserializeOwned>(&self, function: &str, request: &impl Serialize) -> Result<T> {
        self.rpc(function, request, As::Service, None).await
    }

    /// As [`Supabase::call`], and gives up after `limit`.
    pub async fn call_within<T: DeserializeOwned>(
        &self,
        function: &str,
        request: &impl Serialize,
        limit: Duration,
    ) -> Result<T> {
        self.rpc(function, request, As::Service, Some(limit)).await
    }

    /// As [`Supabase::call`], repeated with backoff until `deadline` while the database is away. Only for functions that may be
    /// called twice with the same request.
    pub async fn call_until<T: DeserializeOwned>(
        &self,
        function: &str,
        request: &impl Serialize,
        deadline: Instant,
    ) -> Result<T> {
        let mut pause = Duration::from_millis(100);
        loop {
            match self.call(function, request).await {
                Err(error) if error.is_retryable() && Instant::now() + pause < deadline => {
                    tracing::warn!(function, error = %error, "the database is away; trying again");
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(Duration::from_secs(2));
                }
                result => return result,
            }
        }
    }

    /// Calls a database function with the caller's own JWT, so that RLS decides.
    pub async fn call_as<T: DeserializeOwned>(
        &self,
        jwt: &str,
        function: &str,
        arguments: &impl Serialize,
    ) -> Result<T> {
        self.rpc(function, arguments, As::User(jwt), None).await
    }

    /// Runs a query with the caller's own JWT, so that RLS decides.
    pub async fn query_as<T: DeserializeOwned>(&self, jwt: &str, query: Query) -> Result<T> {
        self.send(query, As::User(jwt), None).await
    }

    async fn rpc<T: DeserializeOwned>(
        &self,
        function: &str,
        arguments: &impl Serialize,
        who: As<'_>,
        limit: Option<Duration>,
    ) -> Result<T> {
        let body = serde_json::to_string(arguments)
            .map_err(|error| Error::internal(format!("{function}: the request is no JSON: {error}")))?;
        self.send(self.rest.rpc(function, body), who, limit).await
    }

    async fn send<T: DeserializeOwned>(&self, query: Query, who: As<'_>, limit: Option<Duration>) -> Result<T> {
        let built =
            query.build().build().map_err(|error| Error::internal(format!("the query cannot be built: {error}")))?;
        let method = reqwest::Method::from_bytes(built.method().as_str().as_bytes())
            .map_err(|error| Error::internal(error.to_string()))?;
        let mut request = self.http.request(method, built.url().as_str());
        for (name, value) in built.headers() {
            request = request.header(name.as_str(), value.as_bytes());
        }
        request = match who {
            As::Service => request.header("apikey", &self.secrets.get().await?.supabase_secret_key),
            As::User(jwt) => request.header("apikey", &self.publishable_key).bearer_auth(jwt),
        };
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        if let Some(body) = built.body().and_then(|body| body.as_bytes()) {
            request = request.body(body.to_vec());
        }
        let asked = Instant::now();
        let answer = request.send().await.map_err(away)?;
        let status = answer.status();
        metrics::measure(Metric::DatabaseMillis, asked.elapsed().as_secs_f64() * 1_000.0);
        let retry_after = answer.headers().get("retry-after").and_then(|value| value.to_str().ok()?.parse().ok());
        let body = answer.bytes().await.map_err(away)?;
        if !status.is_success() {
            return Err(Error::from_postgrest(status, &body, retry_after));
        }
        let body: &[u8] = if body.is_empty() { b"null" } else { &body };
        serde_json::from_slice(body)
            .map_err(|error| Error::internal(format!("the database's answer has another shape: {error}")))
    }
}

fn away(error: reqwest::Error) -> Error {
    Error::unavailable(format!("the database does not answer: {}", error.without_url()))
}
