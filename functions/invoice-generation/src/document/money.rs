//! Money, quantities and dates as a person reads them. Amounts stay integers in the currency's minor unit.

use chrono::NaiveDate;

/// Decimals of a currency's minor unit (ISO 4217). The same list is in `private.decimal_amount`.
pub fn exponent(currency: &str) -> usize {
    match currency {
        "BIF" | "CLP" | "DJF" | "GNF" | "ISK" | "JPY" | "KMF" | "KRW" | "PYG" | "RWF" | "UGX" | "VND" | "VUV"
        | "XAF" | "XOF" | "XPF" => 0,
        "BHD" | "IQD" | "JOD" | "KWD" | "LYD" | "OMR" | "TND" => 3,
        _ => 2,
    }
}

/// The sign that stands for a currency, or its code and a space.
fn sign(currency: &str) -> String {
    match currency {
        "INR" => "₹".to_owned(),
        "EUR" => "€".to_owned(),
        "GBP" => "£".to_owned(),
        "USD" => "$".to_owned(),
        // A no-break space keeps code and amount on one line.
        code => format!("{code}\u{a0}"),
    }
}

/// An amount of the minor unit: `₹1,23,456.78`, `£1,234.50`, `JPY 1,234`. Rupees are grouped as in India: lakh and crore.
pub fn amount(minor: i64, currency: &str) -> String {
    let decimals = exponent(currency);
    let scale = 10_u64.pow(decimals as u32);
    let magnitude = minor.unsigned_abs();
    let whole = group(magnitude / scale, if currency == "INR" { 2 } else { 3 });
    let minus = if minor < 0 { "−" } else { "" };
    let sign = sign(currency);
    if decimals == 0 {
        format!("{minus}{sign}{whole}")
    } else {
        format!("{minus}{sign}{whole}.{:0decimals$}", magnitude % scale)
    }
}

/// A quantity with its unit: `7,410 seconds`, `1 call`.
pub fn quantity(count: i64, unit: &str, currency: &str) -> String {
    let digits = group(count.unsigned_abs(), if currency == "INR" { 2 } else { 3 });
    let minus = if count < 0 { "−" } else { "" };
    let plural = if count == 1 { "" } else { "s" };
    format!("{minus}{digits} {unit}{plural}")
}

/// A rate of hundredths of a percent: `18 %`, `2.5 %`.
pub fn rate(basis_points: i64) -> String {
    let fraction = basis_points % 100;
    let text = match fraction {
        0 => format!("{}", basis_points / 100),
        _ if fraction % 10 == 0 => format!("{}.{}", basis_points / 100, fraction / 10),
        _ => format!("{}.{fraction:02}", basis_points / 100),
    };
    format!("{text}\u{a0}%")
}

/// A day: `1 February 2026`.
pub fn day(date: NaiveDate) -> String {
    date.format("%-d %B %Y").to_string()
}

/// Digits with commas: the last three together, then groups of `size`.
fn group(number: u64, size: usize) -> String {
    let digits = number.to_string();
    if digits.len() <= 3 {
        return digits;
    }
    let (head, tail) = digits.split_at(digits.len() - 3);
    let first = head.len() % size;
    let mut grouped = String::with_capacity(digits.len() * 3 / 2);
    grouped.push_str(&head[..first]);
    for start in (first..head.len()).step_by(size) {
        if !grouped.is_empty() {
            grouped.push(',');
        }
        grouped.push_str(&head[start..start + size]);
    }
    format!("{grouped},{tail}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rupees_are_grouped_as_in_india() {
        for (minor, text) in [
            (0, "₹0.00"),
            (5, "₹0.05"),
            (99_900, "₹999.00"),
            (100_000, "₹1,000.00"),
            (913_320, "₹9,133.20"),
            (1_000_000, "₹10,000.00"),
            (10_000_000, "₹1,00,000.00"),
            (1_234_567_890, "₹1,23,45,678.90"),
            (100_000_000_000, "₹1,00,00,00,000.00"),
            (-12_345_678, "−₹1,23,456.78"),
        ] {
            assert_eq!(amount(minor, "INR"), text);
        }
    }

    #[test]
    fn other_currencies_are_grouped_by_thousands_with_their_own_decimals() {
        for (minor, currency, text) in [
            (123_456_789, "GBP", "£1,234,567.89"),
            (100_000, "USD", "$1,000.00"),
            (1_234_567, "JPY", "JPY\u{a0}1,234,567"),
            (1_234_567, "KWD", "KWD\u{a0}1,234.567"),
            (7, "KWD", "KWD\u{a0}0.007"),
            (12, "XYZ", "XYZ\u{a0}0.12"),
        ] {
            assert_eq!(amount(minor, currency), text);
        }
    }

    #[test]
    fn the_largest_amounts_do_not_overflow() {
        assert_eq!(amount(i64::MAX, "USD"), "$92,233,720,368,547,758.07");
        assert_eq!(amount(i64::MIN, "USD"), "−$92,233,720,368,547,758.08");
    }

    #[test]
    fn quantities_rates_and_days() {
        assert_eq!(quantity(1, "call", "INR"), "1 call");
        assert_eq!(quantity(1_234_567, "second", "INR"), "12,34,567 seconds");
        assert_eq!(quantity(1_234_567, "second", "GBP"), "1,234,567 seconds");
        let rates: Vec<_> = [1_800, 900, 250, 25, 5, 0].map(rate).into();
        assert_eq!(rates, ["18\u{a0}%", "9\u{a0}%", "2.5\u{a0}%", "0.25\u{a0}%", "0.05\u{a0}%", "0\u{a0}%"]);
        assert_eq!(day(NaiveDate::from_ymd_opt(2026, 2, 1).unwrap()), "1 February 2026");
    }
}
