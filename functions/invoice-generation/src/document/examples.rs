//! The typical documents that tests render.

use super::record::Record;
use serde_json::{Value, json};

/// A dot and three bars, in the colour of [`dollars`].
const LOGO: &str = "iVBORw0KGgoAAAANSUhEUgAAAJYAAAAoCAMAAAArH/PVAAAABlBMVEX///9tKNm3n0/XAAAAfElEQVR42u3YwQrAIAwD0PT/f3rHXYQ5TWjmkrPgE0rVAs\
                    lxqTuOJiNZlaGrxplbxczcfq2sbb2ExeD/hkXyk1m8A4TV1VXftriwPs7S3HxhhRVW+hbbhbCWWILSXnahiSV8y5/I0v0TVWWPVhaseoP9xMZ2vuU6DUwe\
                    cgHTZAniZBSUXwAAAABJRU5ErkJggg==";

fn record(value: Value) -> Record {
    serde_json::from_value(value).expect("an example is a record")
}

fn issuer() -> Value {
    json!({
        "legal_name": "Trunkline Telecom Private Limited", "gstin": "29ABCDE1234F1Z5", "pan": "ABCDE1234F",
        "address_line_1": "4th floor, 1 MG Road", "city": "Bengaluru", "state": "Karnataka", "state_code": "KA", "pincode": "560001",
        "country_code": "IN", "email": "billing@trunkline.example", "website": "trunkline.example", "sac_code": "998413",
        "place_of_supply": "29-Karnataka", "color": "#0f4c81",
        "note": "Pay by transfer to Example Bank, account 000123456789, IFSC EXMP0000123, and name the invoice's number."
    })
}

fn base(price: i64) -> Value {
    json!({"position": 1, "kind": "base", "meter_key": null, "description": "Pro plan, monthly", "quantity": 1, "unit": "month",
        "unit_price_minor": price, "price_units": 1, "amount_minor": price})
}

fn invoice() -> Value {
    json!({
        "document": "invoice", "invoice_number": "INV-202602-00042", "status": "open", "currency": "INR", "first_day": "2026-01-01",
        "last_day": "2026-01-31", "subtotal_minor": 774_000, "total_minor": 913_320, "invoice_date": "2026-02-01",
        "due_date": "2026-02-16", "timezone": "Asia/Kolkata", "issuer": issuer(),
        "customer": {
            "name": "Acme Homes Private Limited", "gstin": "29AAACA1111A1Z1", "address_line_1": "12 Residency Road",
            "address_line_2": "Ashok Nagar", "city": "Bengaluru", "state": "Karnataka", "state_code": "KA", "pincode": "560025",
            "country": "India", "country_code": "IN", "place_of_supply": "29-Karnataka"
        },
        "lines": [
            base(699_900),
            {"position": 2, "kind": "included", "meter_key": "call_seconds",
             "description": "Calling time included: 1500 min 00 s of 1500 min 00 s", "quantity": 90_000, "unit": "second",
             "unit_price_minor": 0, "price_units": 1, "amount_minor": 0},
            {"position": 3, "kind": "overage", "meter_key": "call_seconds",
             "description": "Calling time beyond the plan: 123 min 30 s", "quantity": 7_410, "unit": "second",
             "unit_price_minor": 600, "price_units": 60, "amount_minor": 74_100}
        ],
        "taxes": [
            {"position": 1, "name": "CGST", "rate_bp": 900, "taxable_minor": 774_000, "amount_minor": 69_660},
            {"position": 2, "name": "SGST", "rate_bp": 900, "taxable_minor": 774_000, "amount_minor": 69_660}
        ]
    })
}

/// Rupees, within one state.
pub fn gst() -> Record {
    record(invoice())
}

/// One line, from one state to another, to a customer whose name is in another script.
pub fn one_line() -> Record {
    let mut value = invoice();
    value["lines"] = json!([base(999_900)]);
    value["taxes"] =
        json!([{"position": 1, "name": "IGST", "rate_bp": 1_800, "taxable_minor": 999_900, "amount_minor": 179_982}]);
    value["subtotal_minor"] = json!(999_900);
    value["total_minor"] = json!(1_179_882);
    value["customer"] = json!({
        "name": "श्री गणेश प्रॉपर्टीज़", "address_line_1": "७ लक्ष्मी रोड", "city": "पुणे", "pincode": "411030", "state": "Maharashtra",
        "country": "India", "country_code": "IN", "place_of_supply": "27-Maharashtra"
    });
    record(value)
}

/// Sixty lines, some of which need two rows.
pub fn sixty_lines() -> Record {
    let mut value = invoice();
    let lines: Vec<Value> = (1..=60)
        .map(|position| {
            let long = if position % 7 == 0 { ", which were routed over the carrier of the destination and billed by the pulse" } else { "" };
            json!({"position": position, "kind": "overage", "meter_key": "call_seconds",
                "description": format!("Calls of campaign {position:02} to destination group {}{long}", position % 9),
                "quantity": 60 * position, "unit": "second", "unit_price_minor": 600, "price_units": 60, "amount_minor": 600 * position})
        })
        .collect();
    value["lines"] = json!(lines);
    value["subtotal_minor"] = json!(1_098_000);
    value["taxes"] = json!([
        {"position": 1, "name": "CGST", "rate_bp": 900, "taxable_minor": 1_098_000, "amount_minor": 98_820},
        {"position": 2, "name": "SGST", "rate_bp": 900, "taxable_minor": 1_098_000, "amount_minor": 98_820}
    ]);
    value["total_minor"] = json!(1_295_640);
    record(value)
}

/// Dollars, on Letter, with a logo.
pub fn dollars() -> Record {
    record(json!({
        "document": "invoice", "invoice_number": "INV-202602-00043", "status": "open", "currency": "USD", "logo": LOGO, "first_day": "2026-01-01",
        "last_day": "2026-01-31", "subtotal_minor": 123_456_050, "total_minor": 123_456_050, "invoice_date": "2026-02-01",
        "due_date": "2026-03-03", "timezone": "America/New_York",
        "issuer": {"legal_name": "Trunkline Inc.", "address_line_1": "500 Market Street", "city": "San Francisco", "state": "CA",
            "pincode": "94105", "country_code": "US", "email": "billing@trunkline.example", "color": "#6d28d9"},
        "customer": {"name": "Globex Corporation", "address_line_1": "200 Park Avenue", "city": "New York", "state": "NY",
            "pincode": "10166", "country": "United States", "country_code": "US"},
        "lines": [
            {"position": 1, "kind": "base", "meter_key": null, "description": "Enterprise plan, monthly", "quantity": 1, "unit": "month",
             "unit_price_minor": 120_000_000, "price_units": 1, "amount_minor": 120_000_000},
            {"position": 2, "kind": "overage", "meter_key": "sms_messages", "description": "SMS messages beyond the plan: 1382420",
             "quantity": 1_382_420, "unit": "message", "unit_price_minor": 250, "price_units": 100, "amount_minor": 3_456_050}
        ],
        "taxes": []
    }))
}

/// What leaves the country, to a business, with a discount and a credit.
pub fn abroad() -> Record {
    let mut value = invoice();
    let mut first = base(699_900);
    first["discount_minor"] = json!(139_980);
    value["lines"] = json!([
        first,
        {"position": 2, "kind": "credit", "meter_key": null, "description": "Unused time on Starter", "quantity": 1, "unit": "month",
         "unit_price_minor": -249_900, "price_units": 1, "amount_minor": -124_950, "first_day": "2026-01-16", "last_day": "2026-01-31",
         "discount_minor": -24_990}
    ]);
    value["subtotal_minor"] = json!(574_950);
    value["discount_minor"] = json!(114_990);
    value["discounts"] = json!([
        {"name": "Welcome", "percent_bp": 2_000, "amount_minor": 139_980},
        {"name": "Discounts given back with what they were on", "amount_minor": -24_990}
    ]);
    value["taxes"] = json!([{"position": 1, "name": "IGST", "rate_bp": 0, "taxable_minor": 459_960, "amount_minor": 0,
        "treatment": "zero_rated", "note": "Export of services under a letter of undertaking, without payment of integrated tax."}]);
    value["total_minor"] = json!(459_960);
    value["customer"] = json!({"name": "Beispiel GmbH", "tax_id": "DE123456789", "address_line_1": "Hauptstr. 1", "city": "Berlin",
        "pincode": "10115", "country_code": "DE", "place_of_supply": "96-Other Countries"});
    record(value)
}

/// A credit note against [`gst`].
pub fn credit_note() -> Record {
    let mut value = invoice();
    value["document"] = json!("credit_note");
    value["credit_note_number"] = json!("CRN-202602-00001");
    value["credit_note_date"] = json!("2026-02-10");
    value["status"] = json!("issued");
    value["reason"] = json!("The outage of 14 January: calls of that day are not charged");
    value["lines"] = json!([{"position": 1, "description": "Calling time beyond the plan: 123 min 30 s", "amount_minor": 30_000,
        "invoice_position": 3}]);
    value["subtotal_minor"] = json!(30_000);
    value["total_minor"] = json!(35_400);
    value["taxes"] = json!([
        {"position": 1, "name": "CGST", "rate_bp": 900, "taxable_minor": 30_000, "amount_minor": 2_700},
        {"position": 2, "name": "SGST", "rate_bp": 900, "taxable_minor": 30_000, "amount_minor": 2_700}
    ]);
    record(value)
}

/// Registered at India's portal, in a month in which the plan changed.
pub fn registered() -> Record {
    let mut value = invoice();
    let side = |kind: &str, what: &str, price: i64, amount: i64| {
        json!({"position": 2, "kind": kind, "meter_key": null, "description": what, "quantity": 1, "unit": "month", "unit_price_minor": price,
            "price_units": 1, "amount_minor": amount, "first_day": "2026-01-16", "last_day": "2026-01-31"})
    };
    value["lines"] = json!([
        base(249_900),
        side("credit", "Unused time on Starter", -249_900, -128_981),
        side("charge", "Remaining time on Pro", 699_900, 361_239)
    ]);
    value["subtotal_minor"] = json!(482_158);
    value["total_minor"] = json!(568_946);
    value["taxes"] = json!([
        {"position": 1, "name": "CGST", "rate_bp": 900, "taxable_minor": 482_158, "amount_minor": 43_394},
        {"position": 2, "name": "SGST", "rate_bp": 900, "taxable_minor": 482_158, "amount_minor": 43_394}
    ]);
    value["irn"] = json!("0a".repeat(32));
    value["ack_no"] = json!("112010036563310");
    // As long as what the portal signs.
    value["signed_qr"] =
        json!(format!("eyJhbGciOiJSUzI1NiJ9.{}.{}", "eyJkYXRhIjoie".repeat(45), "c2lnbmF0dXJl".repeat(28)));
    record(value)
}

/// All of them by name.
pub fn all() -> [(&'static str, Record); 7] {
    [
        ("one-line", one_line()),
        ("sixty-lines", sixty_lines()),
        ("gst", gst()),
        ("dollars", dollars()),
        ("abroad", abroad()),
        ("credit-note", credit_note()),
        ("registered", registered()),
    ]
}
