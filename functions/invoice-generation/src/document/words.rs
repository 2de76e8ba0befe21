//! Amounts in words, as invoices carry them against a changed digit: in lakh and crore for rupees, in thousands and millions else.

use super::money::exponent;

const ONES: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const TENS: [&str; 10] = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"];
const SHORT_SCALE: [(u64, &str); 5] = [
    (1_000_000_000_000_000, "quadrillion"),
    (1_000_000_000_000, "trillion"),
    (1_000_000_000, "billion"),
    (1_000_000, "million"),
    (1_000, "thousand"),
];
const INDIAN_SCALE: [(u64, &str); 3] = [(10_000_000, "crore"), (100_000, "lakh"), (1_000, "thousand")];

/// How a currency is called: one and many of it, one and many of its minor unit.
fn names(currency: &str) -> Option<[&'static str; 4]> {
    Some(match currency {
        "INR" => ["rupee", "rupees", "paisa", "paise"],
        "USD" => ["US dollar", "US dollars", "cent", "cents"],
        "EUR" => ["euro", "euros", "cent", "cents"],
        "GBP" => ["pound sterling", "pounds sterling", "penny", "pence"],
        "AED" => ["UAE dirham", "UAE dirhams", "fils", "fils"],
        "SGD" => ["Singapore dollar", "Singapore dollars", "cent", "cents"],
        "AUD" => ["Australian dollar", "Australian dollars", "cent", "cents"],
        "CAD" => ["Canadian dollar", "Canadian dollars", "cent", "cents"],
        "JPY" => ["yen", "yen", "sen", "sen"],
        _ => return None,
    })
}

/// `One lakh twenty-three thousand rupees and five paise only`. A currency without a name is called by its code, its minor unit
/// written as a fraction.
pub fn amount(minor: i64, currency: &str) -> String {
    let decimals = exponent(currency);
    let scale = 10_u64.pow(decimals as u32);
    let (whole, rest) = (minor.unsigned_abs() / scale, minor.unsigned_abs() % scale);
    let number = |count| if currency == "INR" { indian(count) } else { western(count) };
    let mut text = if minor < 0 { "minus ".to_owned() } else { String::new() };
    text += &number(whole);
    match names(currency) {
        Some([one, many, minor_one, minor_many]) => {
            text += &format!(" {}", if whole == 1 { one } else { many });
            if rest > 0 {
                text += &format!(" and {} {}", number(rest), if rest == 1 { minor_one } else { minor_many });
            }
        }
        None => {
            text += &format!(" {currency}");
            if rest > 0 {
                text += &format!(" and {rest:0decimals$}/{scale}");
            }
        }
    }
    let mut letters = text.chars();
    let first = letters.next().map(|letter| letter.to_ascii_uppercase()).into_iter();
    format!("{} only", first.chain(letters).collect::<String>())
}

fn indian(number: u64) -> String {
    scaled(number, &INDIAN_SCALE, indian)
}

fn western(number: u64) -> String {
    scaled(number, &SHORT_SCALE, below_thousand)
}

/// `many` says how often a step of the scale is there: crores themselves run to thousands and lakhs.
fn scaled(mut number: u64, scale: &[(u64, &str)], many: impl Fn(u64) -> String) -> String {
    let mut parts = Vec::new();
    for &(size, name) in scale {
        if number >= size {
            parts.push(format!("{} {name}", many(number / size)));
            number %= size;
        }
    }
    if number > 0 || parts.is_empty() {
        parts.push(below_thousand(number));
    }
    parts.join(" ")
}

fn below_thousand(number: u64) -> String {
    let (hundreds, rest) = (number / 100, (number % 100) as usize);
    let tens = match rest {
        0..20 => ONES[rest].to_owned(),
        _ if rest % 10 == 0 => TENS[rest / 10].to_owned(),
        _ => format!("{}-{}", TENS[rest / 10], ONES[rest % 10]),
    };
    match (hundreds, rest) {
        (0, _) => tens,
        (_, 0) => format!("{} hundred", ONES[(hundreds % 20) as usize]),
        _ => format!("{} hundred {tens}", ONES[(hundreds % 20) as usize]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rupees_are_told_in_lakh_and_crore() {
        for (minor, text) in [
            (0, "Zero rupees only"),
            (1, "Zero rupees and one paisa only"),
            (100, "One rupee only"),
            (913_320, "Nine thousand one hundred thirty-three rupees and twenty paise only"),
            (12_345_678, "One lakh twenty-three thousand four hundred fifty-six rupees and seventy-eight paise only"),
            (1_000_000_000, "One crore rupees only"),
            (10_000_000_000_000, "Ten thousand crore rupees only"),
            (
                1_234_567_890_123,
                "One thousand two hundred thirty-four crore fifty-six lakh seventy-eight thousand nine hundred one rupees and \
                 twenty-three paise only",
            ),
        ] {
            assert_eq!(amount(minor, "INR"), text);
        }
    }

    #[test]
    fn other_currencies_are_told_in_thousands() {
        for (minor, currency, text) in [
            (
                123_456_789,
                "USD",
                "One million two hundred thirty-four thousand five hundred sixty-seven US dollars and eighty-nine cents only",
            ),
            (100, "GBP", "One pound sterling only"),
            (1_100_019, "EUR", "Eleven thousand euros and nineteen cents only"),
            (1_000_000, "JPY", "One million yen only"),
            (1_234_005, "KWD", "One thousand two hundred thirty-four KWD and 005/1000 only"),
        ] {
            assert_eq!(amount(minor, currency), text);
        }
    }

    #[test]
    fn the_largest_amounts_have_words() {
        assert!(amount(i64::MAX, "USD").starts_with("Ninety-two quadrillion"));
        assert!(
            amount(i64::MIN, "INR").starts_with("Minus nine hundred twenty-two crore thirty-three lakh"),
            "{}",
            amount(i64::MIN, "INR")
        );
    }
}
