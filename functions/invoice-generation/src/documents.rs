//! Invoices and credit notes of the caller's organization, under their own JWT, so that the database decides what they see; or by a
//! signed link that somebody who may see them was given.

use crate::{
    Invoicing,
    document::{
        code::Code,
        html::html,
        paper::{Moment, Paper},
        pdf::pdf,
        record::Record,
    },
    subscriptions::Change,
};
use chrono::{DateTime, Utc};
use http::{HeaderValue, StatusCode, header};
use lambda_http::Body;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    signed_link,
};
use uuid::Uuid;

/// Documents that a list shows at most.
const LIST_LIMIT: usize = 200;
/// How long a signed link is good.
const LINK_SECONDS: i64 = 15 * 60;

/// The two kinds of documents that there are for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shelf {
    Invoices,
    CreditNotes,
}

impl Shelf {
    /// The segment of the path.
    pub fn segment(self) -> &'static str {
        match self {
            Self::Invoices => "invoices",
            Self::CreditNotes => "credit-notes",
        }
    }

    fn missing(self) -> Error {
        let name = if self == Self::Invoices { "invoice" } else { "credit note" };
        Error::not_found(format!("There is no such {name}, or it is not yours to see")).at("id")
    }
}

/// The forms in which a document is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    Json,
    Html,
    Pdf,
}

impl Form {
    fn ending(self) -> &'static str {
        match self {
            Self::Json => "json",
            Self::Html => "html",
            Self::Pdf => "pdf",
        }
    }

    /// What the `Accept` header prefers: a browser's is HTML.
    fn accepted(request: &Request) -> Self {
        match request.header("accept") {
            Some(accept) if accept.contains("text/html") => Self::Html,
            Some(accept) if accept.contains("application/pdf") => Self::Pdf,
            _ => Self::Json,
        }
    }
}

/// `GET invoices` and `GET credit-notes`: the newest first. Without `billing.view` there are none.
pub async fn list(invoicing: &Invoicing, request: &Request, shelf: Shelf) -> Result<Response> {
    let query = match shelf {
        Shelf::Invoices => invoicing
            .supabase
            .from("invoices")
            .select(
                "id,invoice_number,status,kind,currency,first_day,last_day,subtotal_minor,discount_minor,tax_minor,total_minor,amount_paid_minor,\
                 credited_minor,invoice_date,due_date,past_due_at,paid_at",
            )
            .order("period_start.desc,invoice_number.desc"),
        Shelf::CreditNotes => invoicing
            .supabase
            .from("credit_notes")
            .select(
                "id,credit_note_number,status,invoice_id,reason,currency,subtotal_minor,tax_minor,total_minor,credit_note_date",
            )
            .order("credit_note_date.desc,credit_note_number.desc"),
    };
    let found: Value = invoicing.supabase.query_as(request.user_jwt()?, query.limit(LIST_LIMIT)).await?;
    let name = if shelf == Shelf::Invoices { "invoices" } else { "credit_notes" };
    web::json(&json!({ name: found }))
}

/// `GET invoices/{id}`, `.json`, `.html` or `.pdf`; without an ending as the `Accept` header prefers. With `?t=` by a signed link, else
/// as the caller. Error 404 for one that is not theirs to see, as for one that does not exist.
pub async fn show(invoicing: &Invoicing, request: &Request, shelf: Shelf, name: &str) -> Result<Response> {
    let (id, form) = parse(shelf, name, request)?;
    let token = form_urlencoded::parse(request.query.as_bytes()).find(|(name, _)| name == "t").map(|(_, token)| token);
    let value = match token {
        Some(token) => {
            let secrets = invoicing.secrets.get().await?;
            let now = Utc::now().timestamp();
            signed_link::verify(&secrets.callback_keys, &purpose(shelf, form), id, &token, now)?;
            let document = if shelf == Shelf::Invoices { "invoice" } else { "credit_note" };
            invoicing.supabase.call("open_document", &json!({ "v": 1, "document": document, "id": id })).await?
        }
        None => fetch(invoicing, request, shelf, id).await?,
    };
    answer(value, form)
}

/// `POST invoices/{id}/link`: `{"format":"pdf"}` gives an address that is good for fifteen minutes, for this document in this form.
pub async fn link(invoicing: &Invoicing, request: &Request, shelf: Shelf, id: &str) -> Result<Response> {
    #[derive(Deserialize)]
    struct Wanted {
        #[serde(default = "pdf_form")]
        format: Form,
    }
    fn pdf_form() -> Form {
        Form::Pdf
    }
    let wanted: Wanted = request.json()?;
    let id: Uuid = id.parse().map_err(|_| shelf.missing())?;
    // Who may not see it is given no link to it.
    fetch(invoicing, request, shelf, id).await?;
    let secrets = invoicing.secrets.get().await?;
    let not_after = Utc::now().timestamp() + LINK_SECONDS;
    let token = signed_link::sign(&secrets.callback_keys, &purpose(shelf, wanted.format), id, not_after)
        .ok_or_else(|| Error::internal("there is no key to sign links with"))?;
    web::json(&json!({
        "url": format!(
            "{}/functions/v1/invoice-generation/{}/{id}.{}?t={token}",
            invoicing.public_origin, shelf.segment(), wanted.format.ending()
        ),
        "format": wanted.format,
        "expires_at": DateTime::from_timestamp(not_after, 0),
    }))
}

/// `POST invoices/preview`: the next invoice as of now, or, where the body names a `plan`, the one on which that change would be; in the
/// form that the `Accept` header prefers. Writes nothing.
pub async fn preview(invoicing: &Invoicing, request: &Request) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let change: Change = request.json()?;
    let value = if change.is_one() {
        invoicing.supabase.call_as(jwt, "preview_subscription_change", &json!(change)).await?
    } else {
        invoicing.supabase.call_as(jwt, "preview_invoice", &json!({})).await?
    };
    answer(value, Form::accepted(request))
}

/// What a link is signed for.
fn purpose(shelf: Shelf, form: Form) -> String {
    format!("{}.{}", shelf.segment(), form.ending())
}

async fn fetch(invoicing: &Invoicing, request: &Request, shelf: Shelf, id: Uuid) -> Result<Value> {
    let (function, arguments) = match shelf {
        Shelf::Invoices => ("get_invoice", json!({ "invoice_id": id })),
        Shelf::CreditNotes => ("get_credit_note", json!({ "credit_note_id": id })),
    };
    invoicing.supabase.call_as(request.user_jwt()?, function, &arguments).await
}

/// A document in one of its forms. The PDF is the document as it was issued, byte for byte; the page shows how it stands.
fn answer(mut value: Value, form: Form) -> Result<Response> {
    let mut response = if form == Form::Json {
        // One name for the name of either side; the picture is of no use in data.
        if let Some(issuer) = value.get_mut("issuer").and_then(Value::as_object_mut) {
            let name = issuer.get("legal_name").cloned().unwrap_or_default();
            issuer.insert("name".to_owned(), name);
        }
        value.as_object_mut().map(|fields| fields.remove("logo"));
        web::json(&value)?
    } else {
        let record: Record = serde_json::from_value(value)
            .map_err(|error| Error::internal(format!("the document has another shape: {error}")))?;
        let moment = if form == Form::Pdf { Moment::Issued } else { Moment::Now };
        let paper = Paper::of(&record, moment);
        let code = Code::of(record.signed_qr.as_deref());
        if form == Form::Html {
            web::text(StatusCode::OK, "text/html; charset=utf-8", html(&paper, code.as_ref(), record.pay_at()))?
        } else {
            pdf_response(&paper, code.as_ref())?
        }
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("accept, authorization"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if form == Form::Html {
        // The page needs its own style and the logo in it, and nothing else.
        headers.insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(
                "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'",
            ),
        );
    }
    Ok(response)
}

fn pdf_response(paper: &Paper, code: Option<&Code>) -> Result<Response> {
    let mut response = Response::new(Body::Binary(pdf(paper, code)?));
    let name: String =
        paper.number.chars().map(|letter| if letter.is_ascii_alphanumeric() { letter } else { '-' }).collect();
    let disposition = HeaderValue::try_from(format!("inline; filename=\"{name}.pdf\""))
        .map_err(|error| Error::internal(error.to_string()))?;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/pdf"));
    response.headers_mut().insert(header::CONTENT_DISPOSITION, disposition);
    Ok(response)
}

/// The id and the form that a path's last segment and the `Accept` header ask for.
fn parse(shelf: Shelf, name: &str, request: &Request) -> Result<(Uuid, Form)> {
    let (id, form) = match name.rsplit_once('.') {
        Some((id, "json")) => (id, Form::Json),
        Some((id, "html")) => (id, Form::Html),
        Some((id, "pdf")) => (id, Form::Pdf),
        Some(_) => return Err(shelf.missing().hint("Documents are given as .json, .html and .pdf.")),
        None => (name, Form::accepted(request)),
    };
    // A text that is no UUID names no document.
    Ok((id.parse().map_err(|_| shelf.missing())?, form))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::{HeaderMap, Method};

    const ID: &str = "0199a000-0000-7000-8000-000000000001";

    fn parsed(name: &str, accept: Option<&'static str>) -> Result<Form> {
        let mut headers = HeaderMap::new();
        headers.extend(accept.map(|accept| (header::ACCEPT, HeaderValue::from_static(accept))));
        let request = Request {
            method: Method::GET,
            path: String::new(),
            query: String::new(),
            headers,
            body: Default::default(),
        };
        parse(Shelf::Invoices, name, &request).map(|(_, form)| form)
    }

    #[test]
    fn the_ending_decides_and_then_the_accept_header() {
        for (name, accept, form) in [
            (ID.to_owned(), None, Form::Json),
            (ID.to_owned(), Some("application/json"), Form::Json),
            (ID.to_owned(), Some("text/html,application/xhtml+xml"), Form::Html),
            (ID.to_owned(), Some("application/pdf"), Form::Pdf),
            (format!("{ID}.json"), Some("text/html"), Form::Json),
            (format!("{ID}.html"), Some("application/json"), Form::Html),
            (format!("{ID}.pdf"), Some("text/html"), Form::Pdf),
        ] {
            assert_eq!(parsed(&name, accept).unwrap(), form, "{name} {accept:?}");
        }
    }

    #[test]
    fn what_names_no_invoice_is_404() {
        for name in ["1", "x.html", "0199a000-0000-7000-8000-000000000001.exe", "0199a000-0000-7000-8000-00000000000g"]
        {
            assert_eq!(parsed(name, None).unwrap_err().status, StatusCode::NOT_FOUND, "{name}");
        }
    }
}
