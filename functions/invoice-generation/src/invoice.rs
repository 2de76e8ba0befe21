//! Invoices of the caller's organization, read under their own JWT, so that the database decides what they see.

use crate::document;
use chrono::{DateTime, NaiveDate, Utc};
use http::{HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::json;
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
    supabase::Supabase,
};
use uuid::Uuid;

/// Invoices that a list shows at most.
const LIST_LIMIT: usize = 200;
/// The columns of a list.
const SUMMARY: &str = "id,invoice_number,status,kind,currency,first_day,last_day,subtotal_minor,tax_minor,total_minor,\
                       amount_paid_minor,invoice_date,due_date,paid_at";
/// The columns of a whole invoice, with its lines and taxes.
const WHOLE: &str = "id,invoice_number,status,kind,currency,first_day,last_day,subtotal_minor,tax_minor,total_minor,\
                     amount_paid_minor,invoice_date,due_date,paid_at,organization_id,subscription_id,period_start,period_end,\
                     timezone,finalized_at,issuer,customer,irn,\
                     lines:invoice_lines(position,kind,meter_key,description,quantity,unit,unit_price_minor,price_units,amount_minor),\
                     taxes:invoice_taxes(position,name,rate_bp,taxable_minor,amount_minor)";

/// What a list says of an invoice. Amounts are in the currency's minor unit.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Summary {
    pub id: Uuid,
    pub invoice_number: String,
    pub status: Status,
    pub kind: String,
    pub currency: String,
    /// First day that is billed.
    pub first_day: NaiveDate,
    /// Last day that is billed.
    pub last_day: NaiveDate,
    pub subtotal_minor: i64,
    pub tax_minor: i64,
    pub total_minor: i64,
    pub amount_paid_minor: i64,
    pub invoice_date: NaiveDate,
    pub due_date: NaiveDate,
    pub paid_at: Option<DateTime<Utc>>,
}

/// How far an invoice has come. Drafts are shown to nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Open,
    Paid,
    Void,
    Uncollectible,
}

/// A whole invoice.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Invoice {
    #[serde(flatten)]
    pub summary: Summary,
    pub organization_id: Uuid,
    pub subscription_id: Option<Uuid>,
    pub period_start: DateTime<Utc>,
    pub period_end: DateTime<Utc>,
    /// The zone in which the period's days are read.
    pub timezone: String,
    pub finalized_at: DateTime<Utc>,
    /// Who bills, as it was then.
    pub issuer: Party,
    /// Who is billed, as it was then.
    pub customer: Party,
    /// Reference number of India's e-invoice portal.
    pub irn: Option<String>,
    pub lines: Vec<Line>,
    pub taxes: Vec<Tax>,
}

/// One side of an invoice.
#[derive(Debug, Clone, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Party {
    /// The name on the document; the issuer's is its legal name.
    #[serde(alias = "legal_name")]
    pub name: String,
    pub gstin: Option<String>,
    pub address_line_1: Option<String>,
    pub address_line_2: Option<String>,
    pub city: Option<String>,
    pub state: Option<String>,
    pub state_code: Option<String>,
    pub pincode: Option<String>,
    pub country: Option<String>,
    pub country_code: Option<String>,
    pub email: Option<String>,
    pub sac_code: Option<String>,
}

/// What is charged for.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Line {
    pub position: i32,
    /// `base`, `included` or `overage`.
    pub kind: String,
    pub meter_key: Option<String>,
    pub description: String,
    pub quantity: i64,
    pub unit: String,
    /// The price of `price_units` units.
    pub unit_price_minor: i64,
    pub price_units: i64,
    pub amount_minor: i64,
}

/// One component of the tax.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub struct Tax {
    pub position: i32,
    pub name: String,
    /// Hundredths of a percent.
    pub rate_bp: i64,
    pub taxable_minor: i64,
    pub amount_minor: i64,
}

/// The forms in which an invoice is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Json,
    Html,
}

/// `GET invoices`: the newest first. Without `billing.view` there are none.
pub async fn list(supabase: &Supabase, request: &Request) -> Result<Response> {
    let query =
        supabase.from("invoices").select(SUMMARY).order("period_start.desc,invoice_number.desc").limit(LIST_LIMIT);
    let invoices: Vec<Summary> = supabase.query_as(request.user_jwt()?, query).await?;
    web::json(&json!({ "invoices": invoices }))
}

/// `GET invoices/{id}`, `.json` or `.html`; without an ending as the `Accept` header prefers. Error 404 for one that is not the
/// caller's to see, as for one that does not exist.
pub async fn show(supabase: &Supabase, request: &Request, name: &str) -> Result<Response> {
    let jwt = request.user_jwt()?;
    let (id, form) = parse(name, request.header("accept"))?;
    let query = supabase.from("invoices").select(WHOLE).eq("id", id.to_string()).limit(1);
    let found: Vec<Invoice> = supabase.query_as(jwt, query).await?;
    let mut invoice = found.into_iter().next().ok_or_else(missing)?;
    invoice.lines.sort_by_key(|line| line.position);
    invoice.taxes.sort_by_key(|tax| tax.position);
    let mut response = match form {
        Form::Json => web::json(&invoice)?,
        Form::Html => web::text(StatusCode::OK, "text/html; charset=utf-8", document::html(&invoice))?,
    };
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    headers.insert(header::VARY, HeaderValue::from_static("accept, authorization"));
    if form == Form::Html {
        // The page needs its own style and nothing else.
        headers.insert(
            header::CONTENT_SECURITY_POLICY,
            HeaderValue::from_static(
                "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
            ),
        );
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    }
    Ok(response)
}

fn missing() -> Error {
    Error::not_found("there is no such invoice, or it is not yours to see").at("id")
}

/// The id and the form that a path's last segment and the `Accept` header ask for.
fn parse(name: &str, accept: Option<&str>) -> Result<(Uuid, Form)> {
    let (id, form) = match name.rsplit_once('.') {
        Some((id, "json")) => (id, Form::Json),
        Some((id, "html")) => (id, Form::Html),
        Some(_) => return Err(missing().hint("Invoices are given as .json and as .html.")),
        None if accept.is_some_and(|accept| accept.contains("text/html")) => (name, Form::Html),
        None => (name, Form::Json),
    };
    // A text that is no UUID names no invoice.
    Ok((id.parse().map_err(|_| missing())?, form))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0199a000-0000-7000-8000-000000000001";

    #[test]
    fn the_ending_decides_and_then_the_accept_header() {
        let form = |name: String, accept| parse(&name, accept).map(|(_, form)| form);
        assert_eq!(form(ID.to_owned(), None).unwrap(), Form::Json);
        assert_eq!(form(ID.to_owned(), Some("application/json")).unwrap(), Form::Json);
        assert_eq!(form(ID.to_owned(), Some("text/html,application/xhtml+xml")).unwrap(), Form::Html);
        assert_eq!(form(format!("{ID}.json"), Some("text/html")).unwrap(), Form::Json);
        assert_eq!(form(format!("{ID}.html"), Some("application/json")).unwrap(), Form::Html);
    }

    #[test]
    fn what_names_no_invoice_is_404() {
        for name in ["1", "x.html", "0199a000-0000-7000-8000-000000000001.exe", "0199a000-0000-7000-8000-00000000000g"]
        {
            assert_eq!(parse(name, None).unwrap_err().status, StatusCode::NOT_FOUND, "{name}");
        }
    }
}
