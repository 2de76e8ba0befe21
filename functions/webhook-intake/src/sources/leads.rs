//! `POST leads`: leads of an organization's own systems, by its API key, and of its public forms, by the form's id.
//!
//! Nothing of it is buffered: whoever sends leads is told what became of each, and sends again what was not taken.

use crate::Intake;
use http::StatusCode;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};
use shared::{
    Error, Result,
    api_key::ApiKey,
    http::{self as web, Request, Response},
};
use std::time::Duration;
use uuid::Uuid;

/// Leads that one request may carry.
const MAX_LEADS: usize = 500;
/// How long the database may take for them.
const LIMIT: Duration = Duration::from_secs(10);
/// A field that no person sees. What fills it in is a machine, which is told what a person would be.
const HONEYPOT: &str = "_hp";
/// The form's id among its fields.
const FORM_ID: &str = "form_id";

#[derive(Deserialize)]
struct Answer {
    organization_id: Uuid,
    results: Vec<Value>,
    #[serde(default)]
    replayed: bool,
}

/// What a request carries.
#[derive(Debug, PartialEq)]
enum Sent {
    /// One lead of a public form.
    Form { form: String, lead: Value },
    /// Leads of a system; whether as a batch.
    System { leads: Vec<Value>, is_batch: bool },
    /// What filled in the field that nobody sees.
    Machine,
}

/// Takes leads. A batch is answered 200 with an outcome a lead; a single one with its own: 201 made, 200 known, 422 refused. Errors: 401
/// and 403 for the key, 404 for the form, 400 for what is no lead, 409 for a key that came with another body, 413, 429.
pub async fn receive(intake: &Intake, request: &Request) -> Result<Response> {
    let is_key_sent = ApiKey::is_sent(request);
    let (rpc, is_batch, is_form) = match read(request, is_key_sent)? {
        Sent::Machine => return web::json(&json!({ "result": "accepted" })),
        Sent::Form { form, lead } => (json!({ "form_id": form, "leads": [lead] }), false, true),
        Sent::System { leads, is_batch } => {
            (json!({ "api_key": ApiKey::of(request)?, "leads": leads }), is_batch, false)
        }
    };
    let mut rpc = super::without_nul(rpc);
    rpc["v"] = json!(1);
    if let Some(key) = request.header("idempotency-key") {
        rpc["idempotency_key"] = json!(key);
        rpc["body_sha256"] = json!(hex::encode(Sha256::digest(&request.body)));
    }
    let answer: Answer = intake.supabase.call_within("ingest_leads", &rpc, LIMIT).await?;
    tracing::Span::current().record("organization_id", tracing::field::display(answer.organization_id));
    tracing::debug!(leads = answer.results.len(), is_form, replayed = answer.replayed, "leads");
    if is_batch {
        return web::json(&json!({ "results": answer.results, "replayed": answer.replayed }));
    }
    let outcome = answer.results.into_iter().next();
    single(outcome.ok_or_else(|| Error::internal("ingest_leads answered a lead with nothing"))?, is_form)
}

fn single(outcome: Value, is_form: bool) -> Result<Response> {
    match outcome["status"].as_str() {
        // Whether a number is known here is nobody's business but the organization's.
        Some("created" | "updated") if is_form => web::json(&json!({ "result": "accepted" })),
        Some("created") => web::json_with(StatusCode::CREATED, &outcome),
        Some("updated") => web::json(&outcome),
        _ => {
            let text = |name: &str| outcome[name].as_str().unwrap_or_default().to_owned();
            let error = Error::new(StatusCode::UNPROCESSABLE_ENTITY, text("code"), text("message"));
            Err(if outcome["field"].is_string() { error.at(&text("field")) } else { error })
        }
    }
}

/// Reads a request: with a key it is an organization's system, without one a form's page.
fn read(request: &Request, is_key_sent: bool) -> Result<Sent> {
    let query = || {
        form_urlencoded::parse(request.query.as_bytes())
            .find_map(|(name, value)| (name == FORM_ID).then(|| value.into_owned()))
    };
    if is_key_sent {
        return system(request.json()?);
    }
    let is_form_encoded = request
        .header("content-type")
        .is_some_and(|kind| kind.trim_start().to_ascii_lowercase().starts_with("application/x-www-form-urlencoded"));
    let mut fields: Map<String, Value> = if is_form_encoded {
        request.form().into_iter().map(|(name, value)| (name, Value::String(value))).collect()
    } else {
        match request.json()? {
            Value::Object(fields) => fields,
            _ => return Err(Error::malformed("body", "a form sends one lead: an object of its fields")),
        }
    };
    let form = match fields.remove(FORM_ID) {
        Some(Value::String(form)) => Some(form),
        _ => query(),
    };
    let Some(form) = form.filter(|form| !form.is_empty()) else {
        return Err(
            Error::unauthorized("this route needs an organization's API key, or a form's form_id").at("authorization")
        );
    };
    match fields.remove(HONEYPOT) {
        None | Some(Value::Null) => {}
        Some(Value::String(text)) if text.trim().is_empty() => {}
        Some(_) => return Ok(Sent::Machine),
    }
    Ok(Sent::Form { form, lead: Value::Object(fields) })
}

fn system(body: Value) -> Result<Sent> {
    let (leads, is_batch) = match body {
        Value::Array(leads) => (leads, true),
        Value::Object(mut fields) => match fields.remove("leads") {
            Some(Value::Array(leads)) => (leads, true),
            Some(_) => return Err(Error::malformed("leads", "leads is an array")),
            None => (vec![Value::Object(fields)], false),
        },
        _ => return Err(Error::malformed("body", "the body is one lead, or an array of them")),
    };
    if leads.is_empty() {
        return Err(Error::malformed("body", "there is no lead in the array"));
    }
    if leads.len() > MAX_LEADS {
        return Err(Error::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_many_leads",
            format!("at most {MAX_LEADS} leads are taken at once"),
        )
        .at("body"));
    }
    Ok(Sent::System { leads, is_batch })
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http::{HeaderMap, Method, header::CONTENT_TYPE};

    fn request(query: &str, content_type: &'static str, body: &str) -> Request {
        Request {
            method: Method::POST,
            path: "/functions/v1/webhook-intake/leads".to_owned(),
            query: query.to_owned(),
            headers: HeaderMap::from_iter([(CONTENT_TYPE, http::HeaderValue::from_static(content_type))]),
            body: Bytes::copy_from_slice(body.as_bytes()),
        }
    }

    #[test]
    fn a_form_is_read_as_json_and_as_browsers_send_it() {
        let lead = json!({ "name": "Asha", "phone": "98123 45678" });
        let expected = Sent::Form { form: "f".into(), lead };
        for sent in [
            request("", "application/json", r#"{"form_id":"f","name":"Asha","phone":"98123 45678"}"#),
            request("form_id=f", "application/json", r#"{"name":"Asha","phone":"98123 45678","_hp":""}"#),
            request("", "application/x-www-form-urlencoded", "form_id=f&name=Asha&phone=98123+45678&_hp="),
        ] {
            assert_eq!(read(&sent, false).unwrap(), expected);
        }
    }

    #[test]
    fn what_fills_in_the_hidden_field_is_a_machine() {
        let sent = request("", "application/json", r#"{"form_id":"f","phone":"1","_hp":"http://spam.example"}"#);
        assert_eq!(read(&sent, false).unwrap(), Sent::Machine);
    }

    #[test]
    fn without_key_and_form_it_is_401() {
        let error = read(&request("", "application/json", r#"{"phone":"1"}"#), false).unwrap_err();
        assert_eq!((error.status, error.field.as_deref()), (StatusCode::UNAUTHORIZED, Some("authorization")));
    }

    #[test]
    fn one_lead_a_list_and_a_list_by_name() {
        let leads = |body: &str| read(&request("", "application/json", body), true);
        assert_eq!(
            leads(r#"{"phone":"1"}"#).unwrap(),
            Sent::System { leads: vec![json!({"phone":"1"})], is_batch: false }
        );
        for body in [r#"[{"phone":"1"}]"#, r#"{"leads":[{"phone":"1"}]}"#] {
            assert_eq!(leads(body).unwrap(), Sent::System { leads: vec![json!({"phone":"1"})], is_batch: true });
        }
        for body in ["7", "[]", r#"{"leads":7}"#] {
            assert_eq!(leads(body).unwrap_err().status, StatusCode::BAD_REQUEST, "{body}");
        }
        let many = serde_json::to_string(&vec![json!({}); MAX_LEADS + 1]).unwrap();
        assert_eq!(leads(&many).unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
    }

    #[test]
    fn a_form_s_page_learns_nothing_of_who_is_known() {
        let created = single(json!({ "status": "created", "id": "x" }), true).unwrap();
        let updated = single(json!({ "status": "updated", "id": "y" }), true).unwrap();
        assert_eq!(
            (created.status(), format!("{:?}", created.body())),
            (updated.status(), format!("{:?}", updated.body()))
        );
        let refused =
            single(json!({ "status": "rejected", "code": "invalid_phone", "message": "m", "field": "phone" }), true);
        assert_eq!(refused.unwrap_err().field.as_deref(), Some("phone"));
    }
}
