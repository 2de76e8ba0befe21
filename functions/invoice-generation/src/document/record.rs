//! A document as the database gives it. Amounts are integers of the currency's minor unit, and nothing here computes one.

use chrono::{DateTime, NaiveDate, Utc};
use serde::Deserialize;

/// What kind of document it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Invoice,
    CreditNote,
    /// What the next invoice would be.
    Preview,
}

/// How far an invoice has come; a credit note is issued. Drafts are shown to nobody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    Open,
    Paid,
    Void,
    Uncollectible,
    Issued,
}

/// A whole document.
#[derive(Debug, Clone, Deserialize)]
pub struct Record {
    pub document: Kind,
    /// The invoice's; of a credit note, that of the invoice it is against.
    pub invoice_number: Option<String>,
    pub invoice_date: Option<NaiveDate>,
    pub credit_note_number: Option<String>,
    pub credit_note_date: Option<NaiveDate>,
    /// Why there is a credit note.
    pub reason: Option<String>,
    pub status: Option<Status>,
    pub currency: String,
    /// First day that is billed, by `timezone`.
    pub first_day: Option<NaiveDate>,
    /// Last day that is billed.
    pub last_day: Option<NaiveDate>,
    pub timezone: String,
    /// Of the lines, before discounts.
    pub subtotal_minor: i64,
    /// What is taken off them before tax.
    #[serde(default)]
    pub discounts: Vec<Discount>,
    pub total_minor: i64,
    #[serde(default)]
    pub amount_paid_minor: i64,
    #[serde(default)]
    pub credited_minor: i64,
    pub due_date: Option<NaiveDate>,
    /// Since when it is overdue.
    pub past_due_at: Option<DateTime<Utc>>,
    pub paid_at: Option<DateTime<Utc>>,
    /// The moment that a preview is of.
    pub as_of: Option<DateTime<Utc>>,
    /// Who bills, as it was then.
    pub issuer: Party,
    /// Who is billed, as it was then.
    pub customer: Party,
    /// Reference number of India's e-invoice portal.
    pub irn: Option<String>,
    pub ack_no: Option<String>,
    /// What that portal signed: printed as a QR code.
    pub signed_qr: Option<String>,
    pub lines: Vec<Line>,
    pub taxes: Vec<Tax>,
    /// The issuer's logo, a PNG in base64.
    pub logo: Option<String>,
    /// Where it is paid online now.
    pub payment_link: Option<PaymentLink>,
}

impl Record {
    /// Where it is paid online, for a page that shows how it stands now; never for the document itself.
    pub fn pay_at(&self) -> Option<&str> {
        self.payment_link.as_ref().map(|link| link.url.as_str())
    }
}

/// A page of a payment gateway's.
#[derive(Debug, Clone, Deserialize)]
pub struct PaymentLink {
    pub url: String,
}

/// One side of a document.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Party {
    /// The name on the document; the issuer's is its legal name.
    #[serde(alias = "legal_name")]
    pub name: String,
    pub gstin: Option<String>,
    /// The number of a business abroad.
    pub tax_id: Option<String>,
    pub pan: Option<String>,
    pub address_line_1: Option<String>,
    pub address_line_2: Option<String>,
    pub city: Option<String>,
    pub state: Option<String>,
    pub state_code: Option<String>,
    pub pincode: Option<String>,
    pub country: Option<String>,
    pub country_code: Option<String>,
    pub email: Option<String>,
    pub phone: Option<String>,
    pub website: Option<String>,
    pub sac_code: Option<String>,
    /// India's state by code and name: `29-Karnataka`.
    pub place_of_supply: Option<String>,
    /// What the issuer has printed below the total.
    pub note: Option<String>,
    /// `#0f4c81`.
    pub color: Option<String>,
    /// `A4` or `Letter`.
    pub page_size: Option<String>,
}

/// What is charged for, or taken back.
#[derive(Debug, Clone, Deserialize)]
pub struct Line {
    /// `base`, `included`, `overage` and so on; none on a credit note.
    pub kind: Option<String>,
    pub description: String,
    pub quantity: Option<i64>,
    pub unit: Option<String>,
    /// The price of `price_units` units.
    pub unit_price_minor: Option<i64>,
    pub price_units: Option<i64>,
    pub amount_minor: i64,
    /// What of the amount is taken off, before tax.
    #[serde(default)]
    pub discount_minor: i64,
    /// The first day that it is for, where that is not the invoice's.
    pub first_day: Option<NaiveDate>,
    pub last_day: Option<NaiveDate>,
    /// The line of the invoice that a credit note's line takes back.
    pub invoice_position: Option<i32>,
}

/// One component of the tax.
#[derive(Debug, Clone, Deserialize)]
pub struct Tax {
    pub name: String,
    /// Hundredths of a percent.
    pub rate_bp: i64,
    pub taxable_minor: i64,
    pub amount_minor: i64,
    #[serde(default)]
    pub treatment: Treatment,
    /// What the law wants said where nothing is charged.
    pub note: Option<String>,
}

/// Whether a tax is charged, and if not, why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Treatment {
    #[default]
    Standard,
    ZeroRated,
    /// The customer owes it.
    ReverseCharge,
    Exempt,
}

/// What is taken off an invoice.
#[derive(Debug, Clone, Deserialize)]
pub struct Discount {
    pub name: String,
    /// Hundredths of a percent; none of a fixed amount.
    pub percent_bp: Option<i64>,
    pub amount_minor: i64,
}
