//! The leads of the story: the 200 of `demo/leads.csv`, and as many more as a load test asks for.

use anyhow::{Context, Result, ensure};
use uuid::Uuid;

/// The CSV that ships with the demo.
const CSV: &str = include_str!("../../demo/leads.csv");

/// A sheet of leads as it is sent to `POST /rest/v1/leads` with `Content-Type: text/csv`.
pub struct Sheet {
    /// The CSV, header included.
    pub csv: String,
    /// Leads in it.
    pub rows: usize,
}

/// How many leads the CSV has.
pub fn shipped() -> usize {
    CSV.lines().count() - 1
}

/// `count` leads of one project, in sheets of at most `per_sheet`. Numbers beyond the CSV's are made up, distinct, and as valid.
pub fn sheets(count: usize, per_sheet: usize, project: Uuid) -> Result<Vec<Sheet>> {
    let mut reader = csv::Reader::from_reader(CSV.as_bytes());
    let mut header = reader.headers()?.clone();
    header.push_field("project_id");
    let shipped = reader.records().collect::<Result<Vec<_>, _>>().context("demo/leads.csv")?;
    ensure!(!shipped.is_empty(), "demo/leads.csv has no leads");
    let project = project.to_string();
    let row = |index: usize| {
        let known = &shipped[index % shipped.len()];
        let mut row = known.clone();
        if index >= shipped.len() {
            row =
                [&known[0], &phone(index), &known[2], &format!("made-up-{index:06}"), &known[4]].into_iter().collect();
        }
        row.push_field(&project);
        row
    };
    (0..count)
        .collect::<Vec<_>>()
        .chunks(per_sheet.max(1))
        .map(|indexes| {
            let mut writer = csv::Writer::from_writer(Vec::new());
            writer.write_record(&header)?;
            for index in indexes {
                writer.write_record(&row(*index))?;
            }
            let csv = String::from_utf8(writer.into_inner().map_err(|error| error.into_error())?)?;
            Ok(Sheet { csv, rows: indexes.len() })
        })
        .collect()
}

/// An Indian mobile number that is in no row of the CSV: those begin with 98. The factor has no divisor in common with 10⁸, so that no
/// two indexes give one number.
fn phone(index: usize) -> String {
    format!("+9197{:08}", (index as u64 * 61_803_399 + 27_182_818) % 100_000_000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn leads_are_distinct_and_callable() {
        let project = Uuid::new_v4();
        let sheets = sheets(10_000, 3_000, project).unwrap();
        assert_eq!(sheets.iter().map(|sheet| sheet.rows).collect::<Vec<_>>(), [3_000, 3_000, 3_000, 1_000]);
        let mut phones = BTreeSet::new();
        for sheet in &sheets {
            let mut reader = csv::Reader::from_reader(sheet.csv.as_bytes());
            assert_eq!(reader.headers().unwrap().iter().next_back(), Some("project_id"));
            for record in reader.records() {
                let record = record.unwrap();
                let phone = record[1].to_owned();
                assert!(phone.len() == 13 && phone.starts_with("+919"), "{phone}");
                assert_eq!(record[5], project.to_string());
                assert!(!record[0].is_empty());
                assert!(phones.insert(phone));
            }
        }
        assert_eq!(phones.len(), 10_000);
        assert_eq!(shipped(), 200);
    }
}
