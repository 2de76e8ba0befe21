//! What an accountant takes along: CSV of documents, lines, payments and calls, and the sections of India's GSTR-1.

use crate::Invoicing;
use chrono::NaiveDate;
use http::{HeaderValue, StatusCode, header};
use serde::Deserialize;
use serde_json::{Value, json, value::RawValue};
use shared::{
    Error, Result,
    http::{self as web, Request, Response},
};
use uuid::Uuid;

/// Rows that an export has at most; the database gives one more where there are more.
const MAX_ROWS: usize = 10_000;
/// A function's answer may have 6 MB.
const MAX_BYTES: usize = 5_000_000;

#[derive(Deserialize)]
struct Table {
    columns: Vec<String>,
    rows: Vec<Vec<Value>>,
}

/// `GET invoices/export.csv`, `lines.csv` and `payments.csv`, with `?from&to`, both days included. Errors: 400 without the days, 403
/// without `billing.view`, 413 when there are too many.
pub async fn csv(invoicing: &Invoicing, request: &Request, function: &str) -> Result<Response> {
    let table: Table = invoicing.supabase.call_as(request.user_jwt()?, function, &days(request)?).await?;
    sheet(table, "to")
}

/// `GET invoices/{id}/lines/{n}/calls.csv`: what a line charges for, adding up to it.
pub async fn calls(invoicing: &Invoicing, request: &Request, id: &str, line: &str) -> Result<Response> {
    let missing =
        || Error::not_found("There is no such invoice, or the line is not of something that was counted").at("id");
    let id: Uuid = id.parse().map_err(|_| missing())?;
    let line: i32 = line.parse().map_err(|_| missing())?;
    let arguments = json!({ "invoice_id": id, "line": line });
    let table: Table = invoicing.supabase.call_as(request.user_jwt()?, "export_line_calls", &arguments).await?;
    sheet(table, "id")
}

/// `GET invoices/gstr1.json?from&to`: the sections by the portal's names. Decimals are passed on as the database wrote them.
pub async fn gstr1(invoicing: &Invoicing, request: &Request) -> Result<Response> {
    let found: Box<RawValue> = invoicing.supabase.call_as(request.user_jwt()?, "export_gstr1", &days(request)?).await?;
    let body = bounded(found.get().to_owned(), "to")?;
    given(web::text(StatusCode::OK, "application/json; charset=utf-8", body)?)
}

fn days(request: &Request) -> Result<Value> {
    let day = |wanted: &str| {
        let given = form_urlencoded::parse(request.query.as_bytes()).find(|(name, _)| name == wanted);
        given
            .and_then(|(_, day)| day.parse::<NaiveDate>().ok())
            .ok_or_else(|| Error::malformed(wanted, format!("{wanted} must be a day, as in ?{wanted}=2026-01-31")))
    };
    Ok(json!({ "from_day": day("from")?, "to_day": day("to")? }))
}

fn sheet(table: Table, field: &str) -> Result<Response> {
    if table.rows.len() > MAX_ROWS {
        return Err(too_large(field));
    }
    let body = bounded(text(&table)?, field)?;
    given(web::text(StatusCode::OK, "text/csv; charset=utf-8", body)?)
}

fn text(table: &Table) -> Result<String> {
    let broken = |error: &dyn std::fmt::Display| Error::internal(format!("the CSV cannot be written: {error}"));
    let mut writer = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
    writer.write_record(&table.columns).map_err(|error| broken(&error))?;
    for row in &table.rows {
        writer.write_record(row.iter().map(cell)).map_err(|error| broken(&error))?;
    }
    let bytes = writer.into_inner().map_err(|error| broken(&error))?;
    String::from_utf8(bytes).map_err(|error| broken(&error))
}

/// A cell. A text that a spreadsheet would take for a formula is kept from being one; a negative amount is none.
fn cell(value: &Value) -> String {
    let text = match value {
        Value::Null => return String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let is_number =
        text.strip_prefix('-').is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.'));
    if text.starts_with(['=', '+', '-', '@', '\t', '\r']) && !is_number { format!("'{text}") } else { text }
}

fn bounded(body: String, field: &str) -> Result<String> {
    if body.len() > MAX_BYTES { Err(too_large(field)) } else { Ok(body) }
}

fn too_large(field: &str) -> Error {
    Error::new(StatusCode::PAYLOAD_TOO_LARGE, "export_too_large", format!("more than {MAX_ROWS} rows"))
        .at(field)
        .hint("Ask for fewer days at once.")
}

fn given(mut response: Response) -> Result<Response> {
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("private, no-store"));
    Ok(response)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_quoted_and_never_formulas() {
        let table = Table {
            columns: vec!["a".into(), "b".into()],
            rows: vec![
                vec![json!("=HYPERLINK(\"x\")"), json!("-12.50")],
                vec![json!("-2+3"), json!("Line 1\nline, 2")],
                vec![json!(null), json!(7)],
                vec![json!("@x"), json!("+1")],
            ],
        };
        assert_eq!(
            text(&table).unwrap(),
            "a,b\r\n\"'=HYPERLINK(\"\"x\"\")\",-12.50\r\n'-2+3,\"Line 1\nline, 2\"\r\n,7\r\n'@x,'+1\r\n"
        );
    }

    #[test]
    fn too_many_rows_are_413() {
        let table = |count| Table { columns: vec!["a".into()], rows: vec![vec![json!(1)]; count] };
        assert!(sheet(table(MAX_ROWS), "to").is_ok());
        assert_eq!(sheet(table(MAX_ROWS + 1), "to").unwrap_err().code, "export_too_large");
        assert!(bounded("x".repeat(MAX_BYTES + 1), "to").is_err());
    }
}
