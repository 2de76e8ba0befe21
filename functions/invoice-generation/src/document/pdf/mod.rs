//! A document as a PDF: A4 or Letter, tagged for screen readers (PDF/UA-1), and the same bytes whenever it is made.
//!
//! Nothing of the moment goes in: no time, no random id. The file's ids are hashes of what it says.

mod sheet;
mod text;

use super::{
    code::{self, Code},
    paper::{Address, Mood, Paper},
};
use krilla::{
    Document, SerializeSettings,
    configure::{Accessibility, ConfigurationBuilder},
    destination::XyzDestination,
    geom::Point,
    image::Image,
    metadata::Metadata,
    outline::{Outline, OutlineNode},
    tagging::{TableHeaderScope, Tag},
};
use sha2::{Digest, Sha256};
use shared::{Error, Result};
use sheet::{Color, Node, Sheets, Side, ascent, leading};
use std::num::NonZeroU16;
use text::{Fonts, Line, Style};

const A4: (f32, f32) = (595.28, 841.89);
const LETTER: (f32, f32) = (612.0, 792.0);
const MARGIN: f32 = 48.0;
/// Below it are a page's footer and its margin.
const FOOT: f32 = 64.0;
const INK: Color = [0x1a, 0x1d, 0x21];
const QUIET: Color = [0x55, 0x5c, 0x66];
const RULE: Color = [0xd5, 0xd9, 0xdf];
const SHADE: Color = [0xf3, 0xf5, 0xf8];
const WHITE: Color = [0xff; 3];
const RED: Color = [0x9b, 0x1c, 0x1c];
const AMBER: Color = [0x8a, 0x4b, 0x00];
const GREEN: Color = [0x11, 0x63, 0x2f];
const BODY: Style = Style { size: 9.0, bold: false };
const STRONG: Style = Style { size: 9.0, bold: true };
const LABEL: Style = Style { size: 8.0, bold: true };
const SMALL: Style = Style { size: 8.0, bold: false };
const PAD: f32 = 6.0;
/// The side of the portal's code: a printed module of the largest is still a fifth of a millimetre.
const CODE: f32 = 128.0;

/// The bytes of the PDF, with the portal's code where there is one.
pub fn pdf(paper: &Paper, code: Option<&Code>) -> Result<Vec<u8>> {
    let fonts = Fonts::new().ok_or_else(|| Error::internal("a font of the documents cannot be read"))?;
    let size = if paper.is_letter { LETTER } else { A4 };
    let mut page =
        Layout { paper, fonts: &fonts, sheets: Sheets::new(&fonts, size), left: MARGIN, right: size.0 - MARGIN };
    page.head();
    page.particulars();
    page.lines();
    page.sums();
    page.code(code);
    page.notes();
    page.feet();
    let sheets = page.sheets;

    let configuration = ConfigurationBuilder::new()
        .with_accessibility_validator(Accessibility::UA1)
        .finish()
        .map_err(|error| Error::internal(format!("the PDF's configuration: {error:?}")))?;
    let mut document = Document::new_with(SerializeSettings { configuration, ..SerializeSettings::default() });
    let title = format!("{} {}", paper.title, paper.number);
    let tree = sheets.draw(&mut document).ok_or_else(|| Error::internal("the PDF has a shape without a size"))?;
    document.set_tag_tree(tree);
    let mut outline = Outline::new();
    outline.push_child(OutlineNode::new(title.clone(), XyzDestination::new(0, Point::from_xy(0.0, 0.0))));
    document.set_outline(outline);
    document.set_metadata(
        Metadata::new().title(title).authors(vec![paper.from.name.clone()]).language("en".to_owned()).document_id(
            hex::encode(Sha256::digest(match code {
                Some(code) => format!("{paper:?}{code:?}"),
                None => format!("{paper:?}"),
            })),
        ),
    );
    document.finish().map_err(|error| Error::internal(format!("the PDF cannot be written: {error:?}")))
}

struct Layout<'a> {
    paper: &'a Paper,
    fonts: &'a Fonts,
    sheets: Sheets<'a>,
    left: f32,
    right: f32,
}

impl Layout<'_> {
    /// Logo or name, title, number.
    fn head(&mut self) {
        let paper = self.paper;
        let brand = paper.color;
        let middle = self.left + (self.right - self.left) * 0.55;
        self.sheets.block(0.0, 0.0, self.sheets.width, 6.0, brand);
        let top = 40.0;
        let logo = paper.logo.clone().and_then(|png| Image::from_png(png.into(), true).ok());
        let left_end = match logo {
            Some(logo) => {
                let figure = self.sheets.node(Tag::Figure(Some(paper.from.name.clone())), None);
                top + self.sheets.image(self.left, top, (170.0, 48.0), logo, figure)
            }
            None => {
                let node = self.sheets.node(Tag::P, None);
                let style = Style { size: 14.0, bold: true };
                self.sheets.text(self.left, top, middle - self.left - 16.0, &paper.from.name, style, INK, Some(node))
            }
        };
        let heading = self.sheets.node(Tag::Hn(NonZeroU16::MIN, Some(paper.title.to_owned())), None);
        let mut y = top;
        y = self.rights(y, middle, paper.title, Style { size: 19.0, bold: true }, brand, heading);
        let number = self.sheets.node(Tag::P, None);
        y = self.rights(y + 2.0, middle, &paper.number, Style { size: 11.0, bold: true }, INK, number);
        if let Some((mood, text)) = &paper.status {
            let color = match mood {
                Mood::Open => AMBER,
                Mood::Paid => GREEN,
                Mood::Off => RED,
            };
            let node = self.sheets.node(Tag::P, None);
            y = self.rights(y + 2.0, middle, text, STRONG, color, node);
        }
        self.sheets.y = left_end.max(y) + 18.0;
    }

    /// Text that ends at the right margin, in as many lines as it needs.
    fn rights(&mut self, mut y: f32, from: f32, text: &str, style: Style, color: Color, node: Node) -> f32 {
        for line in self.fonts.wrap(text, style, self.right - from) {
            self.sheets.line(self.right, y + ascent(style), Side::Right, line, color, Some(node));
            y += style.size * 1.3;
        }
        y
    }

    /// Who bills whom, and when.
    fn particulars(&mut self) {
        let width = self.right - self.left;
        let top = self.sheets.y;
        self.sheets.block(self.left, top, width, 0.75, RULE);
        let (gap, side) = (14.0, width * 0.305);
        let top = top + 12.0;
        let mut end = self.address(self.left, top, side, &self.paper.from);
        end = end.max(self.address(self.left + side + gap, top, side, &self.paper.to));
        let x = self.left + 2.0 * (side + gap);
        end = end.max(self.facts(x, top));
        self.sheets.y = end + 18.0;
    }

    fn address(&mut self, x: f32, y: f32, width: f32, address: &Address) -> f32 {
        let role = self.sheets.node(Tag::Hn(NonZeroU16::MIN.saturating_add(1), Some(address.role.to_owned())), None);
        let mut y = self.sheets.text(x, y, width, address.role, LABEL, QUIET, Some(role)) + 2.0;
        let body = self.sheets.node(Tag::P, None);
        y = self.sheets.text(x, y, width, &address.name, Style { size: 10.0, bold: true }, INK, Some(body)) + 1.0;
        for row in &address.rows {
            y = self.sheets.text(x, y, width, row, BODY, INK, Some(body));
        }
        y
    }

    fn facts(&mut self, x: f32, mut y: f32) -> f32 {
        let table = self.sheets.node(Tag::Table.with_summary(Some("Dates and references".to_owned())), None);
        let label_width = 84.0;
        for (label, value) in &self.paper.facts {
            let row = self.sheets.node(Tag::TR, Some(table));
            let name = self.sheets.node(Tag::TH(TableHeaderScope::Row), Some(row));
            self.sheets.text(x, y + 0.9, label_width, label, LABEL, QUIET, Some(name));
            let cell = self.sheets.node(Tag::TD, Some(row));
            y = self.sheets.text(x + label_width, y, self.right - x - label_width, value, BODY, INK, Some(cell)) + 2.0;
        }
        y
    }

    /// The width of each column and where it starts.
    fn columns(&self) -> Vec<(f32, f32)> {
        let columns = &self.paper.columns;
        let natural = |index: usize| {
            let cells =
                self.paper.rows.iter().filter_map(|row| row.get(index)).map(|cell| self.fonts.line(cell, BODY).width);
            let widest = cells.fold(self.fonts.line(columns[index].label, LABEL).width, f32::max);
            let is_last = index + 1 == columns.len();
            (if is_last { widest } else { widest.min(104.0) }) + 2.0 * PAD + 0.5
        };
        let mut widths: Vec<f32> = (1..columns.len()).map(natural).collect();
        let rest = self.right - self.left - widths.iter().sum::<f32>();
        widths.insert(0, rest.max(120.0));
        let mut x = self.left;
        let place = |width: f32| {
            let start = x;
            x += width;
            (start, width)
        };
        widths.into_iter().map(place).collect()
    }

    /// The lines, over as many pages as they need, each with the table's head.
    fn lines(&mut self) {
        let columns = self.columns();
        let table = self.sheets.node(Tag::Table.with_summary(Some("What it is for".to_owned())), None);
        let head = self.sheets.node(Tag::THead, Some(table));
        self.table_head(&columns, Some(head));
        let body = self.sheets.node(Tag::TBody, Some(table));
        for cells in &self.paper.rows {
            let wrapped: Vec<Vec<Line>> = cells
                .iter()
                .zip(&columns)
                .map(|(cell, (_, width))| self.fonts.wrap(cell, BODY, width - 2.0 * PAD))
                .collect();
            let rows = wrapped.iter().map(Vec::len).max().unwrap_or(1);
            let height = rows as f32 * leading(BODY) + 9.0;
            if self.sheets.y + height > self.sheets.height - FOOT {
                self.next_page();
                self.table_head(&columns, None);
            }
            let row = self.sheets.node(Tag::TR, Some(body));
            let top = self.sheets.y + 4.5;
            for (index, (lines, (x, width))) in wrapped.into_iter().zip(&columns).enumerate() {
                let cell = match index {
                    0 => self.sheets.node(Tag::TH(TableHeaderScope::Row), Some(row)),
                    _ => self.sheets.node(Tag::TD, Some(row)),
                };
                let (x, side) = self.cell_side(index, *x, *width);
                for (number, line) in lines.into_iter().enumerate() {
                    let y = top + number as f32 * leading(BODY) + ascent(BODY);
                    self.sheets.line(x, y, side, line, INK, Some(cell));
                }
            }
            self.sheets.y += height;
            self.sheets.block(self.left, self.sheets.y - 0.5, self.right - self.left, 0.5, RULE);
        }
    }

    fn cell_side(&self, index: usize, x: f32, width: f32) -> (f32, Side) {
        if self.paper.columns[index].is_figure { (x + width - PAD, Side::Right) } else { (x + PAD, Side::Left) }
    }

    /// The table's head; on further pages it is read once only, so it is no content there.
    fn table_head(&mut self, columns: &[(f32, f32)], head: Option<Node>) {
        let height = leading(LABEL) + 9.0;
        self.sheets.block(self.left, self.sheets.y, self.right - self.left, height, SHADE);
        let row = head.map(|head| self.sheets.node(Tag::TR, Some(head)));
        for (index, (x, width)) in columns.iter().enumerate() {
            let cell = row.map(|row| self.sheets.node(Tag::TH(TableHeaderScope::Column), Some(row)));
            let (x, side) = self.cell_side(index, *x, *width);
            let line = self.fonts.line(self.paper.columns[index].label, LABEL);
            self.sheets.line(x, self.sheets.y + 4.5 + ascent(LABEL), side, line, INK, cell);
        }
        self.sheets.y += height;
    }

    fn next_page(&mut self) {
        self.sheets.turn(30.0);
        self.sheets.block(0.0, 0.0, self.sheets.width, 6.0, self.paper.color);
        let told = format!("{} {}, continued", self.paper.title, self.paper.number);
        let line = self.fonts.line(&told, LABEL);
        self.sheets.line(self.left, 30.0 + ascent(LABEL), Side::Left, line, QUIET, None);
        self.sheets.y = 50.0;
    }

    /// Subtotal, taxes and total, kept together, with the total in words beside them.
    fn sums(&mut self) {
        let (row_height, sum_height) = (leading(BODY) + 4.0, leading(STRONG) + 9.0);
        let widths = self.paper.totals.iter().map(|total| {
            self.fonts.line(&total.label, STRONG).width
                + self.fonts.line(&total.amount, STRONG).width
                + 24.0
                + 2.0 * PAD
        });
        let width = widths.fold(210.0, f32::max).min(self.right - self.left);
        let x = self.right - width;
        let words_width = x - self.left - 24.0;
        let beside = words_width > 120.0;
        let words_lines =
            self.fonts.wrap(&self.paper.words, BODY, if beside { words_width } else { self.right - self.left });
        let words_height = words_lines.len() as f32 * leading(BODY) + leading(LABEL) + 2.0;
        let sums_height: f32 =
            self.paper.totals.iter().map(|total| if total.is_sum { sum_height + 2.0 } else { row_height }).sum();
        let height = if beside { words_height.max(sums_height) } else { words_height + sums_height + 12.0 };
        if self.sheets.y + 10.0 + height > self.sheets.height - FOOT {
            self.next_page();
        }
        let top = self.sheets.y + 10.0;
        let table = self.sheets.node(Tag::Table.with_summary(Some("Totals".to_owned())), None);
        let mut y = top;
        for total in &self.paper.totals {
            let row = self.sheets.node(Tag::TR, Some(table));
            let label = self.sheets.node(Tag::TH(TableHeaderScope::Row), Some(row));
            let amount = self.sheets.node(Tag::TD, Some(row));
            let (style, color, height) =
                if total.is_sum { (STRONG, WHITE, sum_height) } else { (BODY, INK, row_height) };
            if total.is_sum {
                y += 2.0;
                self.sheets.block(x, y, width, height, self.paper.color);
            }
            let base = y + (height - leading(style)) / 2.0 + ascent(style);
            self.sheets.line(x + PAD, base, Side::Left, self.fonts.line(&total.label, style), color, Some(label));
            self.sheets.line(
                self.right - PAD,
                base,
                Side::Right,
                self.fonts.line(&total.amount, style),
                color,
                Some(amount),
            );
            y += height;
        }
        let words = self.sheets.node(Tag::P, None);
        let words_top = if beside { top } else { y + 10.0 };
        let below =
            self.sheets.text(self.left, words_top + 3.0, words_width.max(120.0), "In words", LABEL, QUIET, Some(words))
                + 1.0;
        for (number, line) in words_lines.into_iter().enumerate() {
            let base = below + number as f32 * leading(BODY) + ascent(BODY);
            self.sheets.line(self.left, base, Side::Left, line, INK, Some(words));
        }
        self.sheets.y = top + height;
    }

    /// The portal's code, kept together with what it is.
    fn code(&mut self, code: Option<&Code>) {
        let Some(code) = code else { return };
        let side = code.side() as u32;
        if self.sheets.y + 12.0 + CODE + leading(LABEL) > self.sheets.height - FOOT {
            self.next_page();
        }
        let top = self.sheets.y + 12.0;
        let figure = self.sheets.node(Tag::Figure(Some(code::LABEL.to_owned())), None);
        let image = Image::from_rgba8(code.pixels(), side, side);
        let below = top + self.sheets.image(self.left, top, (CODE, CODE), image, figure);
        let told = self.sheets.node(Tag::P, None);
        self.sheets.y = self.sheets.text(self.left, below, CODE * 2.0, code::LABEL, LABEL, QUIET, Some(told));
    }

    fn notes(&mut self) {
        self.sheets.y += 20.0;
        for note in &self.paper.notes {
            let lines = self.fonts.wrap(note, SMALL, self.right - self.left);
            let height = lines.len() as f32 * leading(SMALL);
            if self.sheets.y + height > self.sheets.height - FOOT {
                self.next_page();
            }
            let node = self.sheets.node(Tag::P, None);
            for line in lines {
                self.sheets.line(self.left, self.sheets.y + ascent(SMALL), Side::Left, line, QUIET, Some(node));
                self.sheets.y += leading(SMALL);
            }
            self.sheets.y += 4.0;
        }
    }

    /// The foot of every page, now that it is known how many there are.
    fn feet(&mut self) {
        let pages = self.sheets.count();
        let base = self.sheets.height - 34.0;
        let told = format!("{}, {} {}", self.paper.from.name, self.paper.title.to_lowercase(), self.paper.number);
        for page in 0..pages {
            self.sheets.block_on(page, [self.left, base - 13.0, self.right - self.left, 0.5], RULE);
            let number = self.fonts.line(&format!("Page {} of {pages}", page + 1), SMALL);
            let room = self.right - self.left - number.width - 20.0;
            self.sheets.line_on(page, self.right, base, Side::Right, number, QUIET, None);
            if let Some(line) = self.fonts.wrap(&told, SMALL, room).into_iter().next() {
                self.sheets.line_on(page, self.left, base, Side::Left, line, QUIET, None);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::document::{
        examples,
        paper::Moment,
        record::{PaymentLink, Status},
    };

    fn made(record: &crate::document::record::Record) -> Vec<u8> {
        pdf(&Paper::of(record, Moment::Issued), Code::of(record.signed_qr.as_deref()).as_ref()).expect("a PDF")
    }

    /// `DOCUMENTS=folder cargo test -p invoice-generation examples` leaves them there, to be looked at.
    #[test]
    fn the_examples_are_made_twice_the_same() {
        for (name, record) in examples::all() {
            let bytes = made(&record);
            assert!(bytes.starts_with(b"%PDF-1.7"), "{name}");
            assert_eq!(bytes, made(&record), "{name}");
            assert!(bytes.len() < 120_000, "{name} has {} bytes", bytes.len());
            if let Some(folder) = std::env::var_os("DOCUMENTS") {
                let folder = std::path::Path::new(&folder);
                std::fs::write(folder.join(format!("{name}.pdf")), &bytes).expect("a file");
                let code = Code::of(record.signed_qr.as_deref());
                let page =
                    crate::document::html::html(&Paper::of(&record, Moment::Now), code.as_ref(), record.pay_at());
                std::fs::write(folder.join(format!("{name}.html")), page).expect("a file");
            }
        }
    }

    /// The text as a reader copies it out, with single spaces; none without poppler, which only CI must have.
    fn read(bytes: &[u8]) -> Option<String> {
        use std::{
            io::Write,
            process::{Command, Stdio},
        };
        let command =
            Command::new("pdftotext").args(["-layout", "-", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
        let mut child = match command {
            Ok(child) => child,
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "pdftotext: {error}");
                return None;
            }
        };
        child.stdin.take().expect("a pipe").write_all(bytes).expect("it reads");
        let output = child.wait_with_output().expect("it ends");
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).expect("UTF-8");
        Some(
            text.split(|c: char| c.is_whitespace() && c != '\n')
                .filter(|word| !word.is_empty())
                .collect::<Vec<_>>()
                .join(" "),
        )
    }

    #[test]
    fn the_text_says_every_amount_of_the_data() {
        for (name, record) in examples::all() {
            let Some(text) = read(&made(&record)) else { return };
            let currency = &record.currency;
            let amount = |minor| crate::document::money::amount(minor, currency);
            let has_line = |parts: &[&str]| {
                text.lines().any(|line| {
                    let mut rest = line;
                    parts.iter().all(|part| {
                        rest.split_once(part).is_some_and(|(_, after)| {
                            rest = after;
                            true
                        })
                    })
                })
            };
            for line in &record.lines {
                // Of a description in several rows, the first stands beside the amount.
                let begun: String = line.description.split(' ').take(5).collect::<Vec<_>>().join(" ");
                let discount = if line.discount_minor == 0 { String::new() } else { amount(-line.discount_minor) };
                assert!(has_line(&[&begun, &amount(line.amount_minor), &discount]), "{name}: {begun} in\n{text}");
            }
            for discount in &record.discounts {
                assert!(has_line(&[&discount.name, &amount(-discount.amount_minor)]), "{name} in\n{text}");
            }
            for note in record.taxes.iter().filter_map(|tax| tax.note.as_deref()) {
                let begun: String = note.split(' ').take(5).collect::<Vec<_>>().join(" ");
                assert!(text.contains(&begun), "{name}: {begun} in\n{text}");
            }
            for tax in &record.taxes {
                let (on, levied) = (amount(tax.taxable_minor), amount(tax.amount_minor));
                assert!(has_line(&[&tax.name, &on, &levied]), "{name}: {} in\n{text}", tax.name);
            }
            assert!(has_line(&["Subtotal", &amount(record.subtotal_minor)]), "{name} in\n{text}");
            assert!(has_line(&["Total", &amount(record.total_minor)]), "{name} in\n{text}");
            let number = record.credit_note_number.as_ref().or(record.invoice_number.as_ref()).expect("a number");
            assert!(text.contains(number.as_str()), "{name}: {number} in\n{text}");
            let pages = text.matches("Page ").count();
            assert!(text.contains(&format!("Page {pages} of {pages}")), "{name} in\n{text}");
            // The head of the table is on every page that has lines.
            assert_eq!(text.matches("Description").count(), pages, "{name} in\n{text}");
        }
    }

    /// Invoices of before stay what they were, through every process and every change here: what changes these bytes does it knowingly.
    #[test]
    fn the_bytes_are_those_that_they_always_were() {
        let hash = hex::encode(Sha256::digest(made(&examples::gst())));
        assert_eq!(hash, "8da594173dce1a55465d44d7e3c3506e8f7359a5000e6ba76418e55f06a77403");
    }

    #[test]
    fn what_was_paid_later_does_not_change_the_document() {
        let mut record = examples::gst();
        let issued = made(&record);
        record.status = Some(Status::Paid);
        record.amount_paid_minor = record.total_minor;
        record.payment_link = Some(PaymentLink { url: "https://pay.example.com/1".to_owned() });
        assert_eq!(made(&record), issued);
        record.status = Some(Status::Void);
        assert_ne!(made(&record), issued);
        record.status = Some(Status::Open);
        record.lines[0].amount_minor += 1;
        assert_ne!(made(&record), issued);
    }

    #[test]
    fn what_the_portal_signed_is_printed_as_its_code() {
        let mut record = examples::gst();
        let without = made(&record);
        record.signed_qr = Some("eyJhbGciOiJSUzI1NiJ9.".repeat(50));
        let bytes = made(&record);
        assert_eq!(bytes, made(&record));
        assert!(bytes.len() > without.len() && bytes.len() < 120_000, "{} bytes", bytes.len());
        if let Some(text) = read(&bytes) {
            assert!(text.contains("Signed QR code of the e-invoice"), "{text}");
        }
        record.signed_qr = Some("eyJhbGciOiJSUzI1NiJ9.".repeat(49));
        assert_ne!(made(&record), bytes, "another text is another code");
    }

    #[test]
    fn no_text_is_too_odd_to_be_printed() {
        let odd = "漢字 \u{202e}abc\u{0}\n\n\t👩‍👩‍👧 ".to_owned() + &"x".repeat(3_000);
        let mut record = examples::credit_note();
        record.customer.name.clone_from(&odd);
        record.reason = Some(odd.clone());
        record.issuer.note = Some(odd.clone());
        record.lines[0].description = odd;
        record.logo = Some("bm8gcG5n".to_owned());
        made(&record);
        record.lines.clear();
        record.customer = crate::document::record::Party::default();
        made(&record);
    }
}
