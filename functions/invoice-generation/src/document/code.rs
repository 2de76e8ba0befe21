//! The signed code of India's invoice portal, as a picture. What it says is the portal's: it is drawn as it came.

use qrcodegen::{QrCode, QrCodeEcc};
use std::fmt::Write;

/// What stands beside it.
pub const LABEL: &str = "Signed QR code of the e-invoice";
/// The empty frame that a reader needs, in modules.
const QUIET: usize = 4;

/// A QR code: so many modules a side, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Code {
    size: usize,
    dark: Vec<bool>,
}

impl Code {
    /// The code of a text; none without one, or where it is too long for any.
    pub fn of(text: Option<&str>) -> Option<Self> {
        let code = QrCode::encode_text(text.filter(|text| !text.is_empty())?, QrCodeEcc::Low).ok()?;
        let size = usize::try_from(code.size()).ok()?;
        let dark = (0..code.size()).flat_map(|y| (0..code.size()).map(move |x| (x, y)));
        Some(Self { size, dark: dark.map(|(x, y)| code.get_module(x, y)).collect() })
    }

    /// The side with its frame, in modules.
    pub fn side(&self) -> usize {
        self.size + 2 * QUIET
    }

    /// A pixel a module, its frame white: red, green, blue, opaque.
    pub fn pixels(&self) -> Vec<u8> {
        let side = self.side();
        let mut pixels = vec![0xff; side * side * 4];
        for (place, _) in self.dark.iter().enumerate().filter(|(_, dark)| **dark) {
            let (x, y) = (place % self.size + QUIET, place / self.size + QUIET);
            let start = (y * side + x) * 4;
            pixels[start..start + 3].fill(0);
        }
        pixels
    }

    /// The same as an SVG path, a step a module.
    pub fn path(&self) -> String {
        let mut path = String::new();
        for (y, row) in self.dark.chunks(self.size).enumerate() {
            let mut x = 0;
            while x < row.len() {
                let run = row[x..].iter().take_while(|dark| **dark == row[x]).count();
                if row[x] {
                    // Writing to a String does not fail.
                    let _ = write!(path, "M{} {}h{run}v1h-{run}z", x + QUIET, y + QUIET);
                }
                x += run;
            }
        }
        path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_has_its_finders_and_its_frame() {
        let code = Code::of(Some(&"eyJhbGciOiJSUzI1NiJ9.".repeat(50))).expect("a code");
        let (side, pixels) = (code.side(), code.pixels());
        assert_eq!((side, pixels.len()), (code.size + 8, side * side * 4));
        let dark = |x: usize, y: usize| pixels[(y * side + x) * 4] == 0;
        // Seven dark modules in a row, in three corners and not in the fourth.
        let finder = |x: usize, y: usize| (0..7).all(|step| dark(x + step, y) && dark(x, y + step));
        assert!(finder(4, 4) && finder(side - 11, 4) && finder(4, side - 11) && !finder(side - 11, side - 11));
        assert!((0..side).all(|step| !dark(step, 3) && !dark(3, step)));
        assert!(code.path().starts_with("M4 4h7v1h-7z"));
    }

    #[test]
    fn nothing_has_no_code_and_neither_has_too_much() {
        assert_eq!(Code::of(None), None);
        assert_eq!(Code::of(Some("")), None);
        assert_eq!(Code::of(Some(&"x".repeat(3_000))), None);
    }
}
