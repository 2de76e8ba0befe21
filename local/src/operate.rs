//! What an operator does by hand: finds what is wrong, looks at events and at queues, and sends through again what got stuck.

pub mod accounts;
pub mod attempts;
pub mod aws;
pub mod billing;
pub mod connect;
pub mod database;
pub mod dialling;
pub mod doctor;
pub mod events;
pub mod queues;
pub mod rates;
pub mod restored;

/// Rows under headings, each column as wide as what is in it. The last column is left as it is.
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .chain([headings[column].len()])
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded: Vec<String> = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell}{}", " ".repeat(width.saturating_sub(cell.chars().count()))))
            .collect();
        padded.join("  ").trim_end().to_owned()
    };
    let headings: Vec<String> = headings.iter().map(|heading| heading.to_uppercase()).collect();
    std::iter::once(line(&headings))
        .chain(rows.iter().map(|row| line(row)))
        .fold(String::new(), |text, line| text + &line + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows = [vec!["plivo".to_owned(), "1".to_owned()], vec!["é".to_owned(), "long".to_owned()]];
        assert_eq!(table(&["source", "n"], &rows), "SOURCE  N\nplivo   1\né       long\n");
    }
}
