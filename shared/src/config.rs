//! What a function is told by its environment, read once at start.

use crate::{Error, Result};
use std::collections::BTreeMap;
use url::Url;

/// The environment of a function. Nothing else is read from it, save what Lambda itself sets.
#[derive(Debug, Clone)]
pub struct Config {
    /// `SUPABASE_URL`: the project's origin; PostgREST is below `/rest/v1`.
    pub supabase_url: Url,
    /// `SUPABASE_PUBLISHABLE_KEY`: sent as `apikey` beside a caller's own JWT.
    pub publishable_key: String,
    /// `PUBLIC_ORIGIN`: the origin under which carriers reach us, without a trailing slash. Signatures are verified against it,
    /// never against what a proxy says the host was. `INTAKE_ORIGIN` takes its place where `webhook-intake` has an address of its own.
    pub public_origin: String,
    /// `SECRET_ARN`: the one secret of the stack (see [`crate::secrets`]).
    pub secret_arn: String,
    /// `<QUEUE>_QUEUE_URL`, by lower-case queue name.
    pub queues: BTreeMap<String, String>,
    /// `AGENT_ORIGINS`: JSON object from agent id, or `default`, to the websocket origin of that voice agent.
    pub agent_origins: BTreeMap<String, String>,
    /// `LOG_LEVEL`: a `tracing` filter, `info` when absent.
    pub log_level: String,
}

impl Config {
    /// Reads the process's environment. All problems are reported together.
    pub fn from_env() -> Result<Self> {
        Self::from_vars(std::env::vars())
    }

    /// Reads variables given as pairs; tests use it.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>) -> Result<Self> {
        let vars: BTreeMap<String, String> = vars.into_iter().collect();
        let mut problems = Vec::new();
        let mut required = |name: &str| match vars.get(name).filter(|v| !v.is_empty()) {
            Some(value) => value.clone(),
            None => {
                problems.push(format!("{name} is not set"));
                String::new()
            }
        };
        let supabase_url = required("SUPABASE_URL");
        let publishable_key = required("SUPABASE_PUBLISHABLE_KEY");
        let origin_name = match vars.get("INTAKE_ORIGIN") {
            Some(origin) if !origin.is_empty() => "INTAKE_ORIGIN",
            _ => "PUBLIC_ORIGIN",
        };
        let public_origin = required(origin_name).trim_end_matches('/').to_owned();
        let secret_arn = required("SECRET_ARN");
        let url = |name: &str, value: &str, problems: &mut Vec<String>| match Url::parse(value) {
            Ok(url) => Some(url),
            Err(_) if value.is_empty() => None,
            Err(error) => {
                problems.push(format!("{name} is not a URL: {error}"));
                None
            }
        };
        let supabase_url = url("SUPABASE_URL", &supabase_url, &mut problems);
        url(origin_name, &public_origin, &mut problems);
        let agent_origins = match vars.get("AGENT_ORIGINS").map(|text| serde_json::from_str(text)) {
            None => BTreeMap::new(),
            Some(Ok(origins)) => origins,
            Some(Err(error)) => {
                problems.push(format!("AGENT_ORIGINS is not a JSON object of strings: {error}"));
                BTreeMap::new()
            }
        };
        let queues = vars
            .iter()
            .filter_map(|(name, value)| {
                let queue = name.strip_suffix("_QUEUE_URL")?;
                Some((queue.to_ascii_lowercase(), value.clone()))
            })
            .collect();
        match supabase_url {
            Some(supabase_url) if problems.is_empty() => Ok(Self {
                supabase_url,
                publishable_key,
                public_origin,
                secret_arn,
                queues,
                agent_origins,
                log_level: vars.get("LOG_LEVEL").cloned().unwrap_or_else(|| "info".to_owned()),
            }),
            _ => Err(Error::internal(problems.join("; "))),
        }
    }

    /// The URL of a queue by its name, as `dial`.
    pub fn queue_url(&self, name: &str) -> Result<&str> {
        self.queues
            .get(name)
            .map(String::as_str)
            .ok_or_else(|| Error::internal(format!("{}_QUEUE_URL is not set", name.to_ascii_uppercase())))
    }

    /// The websocket origin of a voice agent; the `default` one when the agent has none of its own.
    pub fn agent_origin(&self, agent_id: &str) -> Option<&str> {
        self.agent_origins.get(agent_id).or_else(|| self.agent_origins.get("default")).map(String::as_str)
    }

    /// Whether this is a stack on one machine: only there may a carrier's API be plain HTTP on loopback.
    pub fn is_local(&self) -> bool {
        matches!(self.supabase_url.host_str(), Some("127.0.0.1" | "localhost" | "[::1]"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn vars(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect()
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let error = Config::from_vars(vars(&[("SUPABASE_URL", "not a url"), ("AGENT_ORIGINS", "[]")])).unwrap_err();
        for name in ["SUPABASE_URL", "PUBLIC_ORIGIN", "SECRET_ARN", "AGENT_ORIGINS"] {
            assert!(error.message.contains(name), "{name} in {}", error.message);
        }
    }

    #[test]
    fn an_intake_with_an_address_of_its_own_is_known_by_that() {
        let told = |intake: &str| {
            let pairs = [
                ("SUPABASE_URL", "http://127.0.0.1:1"),
                ("SUPABASE_PUBLISHABLE_KEY", "sb_publishable_x"),
                ("PUBLIC_ORIGIN", "https://api.example.com"),
                ("SECRET_ARN", "arn"),
                ("INTAKE_ORIGIN", intake),
            ];
            Config::from_vars(vars(&pairs)).unwrap().public_origin
        };
        assert_eq!(told(""), "https://api.example.com");
        assert_eq!(told("https://intake.example.com/"), "https://intake.example.com");
    }

    #[test]
    fn an_agent_without_an_origin_of_its_own_gets_the_default() {
        let config = Config::from_vars(vars(&[
            ("SUPABASE_URL", "http://127.0.0.1:1"),
            ("SUPABASE_PUBLISHABLE_KEY", "sb_publishable_x"),
            ("PUBLIC_ORIGIN", "https://api.example.com/"),
            ("SECRET_ARN", "arn"),
            ("DIAL_QUEUE_URL", "http://q/dial"),
            ("AGENT_ORIGINS", r#"{"default":"wss://voice.example.com","a":"wss://a.example.com"}"#),
        ]))
        .unwrap();
        assert_eq!(config.public_origin, "https://api.example.com");
        assert_eq!(config.agent_origin("a"), Some("wss://a.example.com"));
        assert_eq!(config.agent_origin("b"), Some("wss://voice.example.com"));
        assert_eq!(config.queue_url("dial").unwrap(), "http://q/dial");
        assert!(config.queue_url("intake").is_err());
    }
}
