//! Text as glyphs: which font has a character, how wide a line is, where it breaks.

use krilla::text::{Font, GlyphId, KrillaGlyph};
use rustybuzz::{Face, UnicodeBuffer};

/// Noto Sans, and the scripts of India for what it lacks. In the order in which they are asked.
const FILES: [&[u8]; 10] = [
    include_bytes!("../../../fonts/NotoSans-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSans-Bold.ttf"),
    include_bytes!("../../../fonts/NotoSansDevanagari-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansBengali-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansGujarati-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansGurmukhi-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansKannada-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansMalayalam-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansTamil-Regular.ttf"),
    include_bytes!("../../../fonts/NotoSansTelugu-Regular.ttf"),
];
const REGULAR: usize = 0;
const BOLD: usize = 1;
const FALLBACKS: std::ops::Range<usize> = 2..FILES.len();
/// What stands for a character that no font has: a document is never refused for a name.
const UNKNOWN: char = '\u{fffd}';

/// How a text is set.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Style {
    pub size: f32,
    pub bold: bool,
}

/// A piece of a line that one font draws.
#[derive(Debug, Clone)]
pub struct Run {
    pub font: usize,
    pub text: String,
    pub glyphs: Vec<KrillaGlyph>,
    /// At the line's size.
    pub width: f32,
}

/// One line of text, shaped.
#[derive(Debug, Clone)]
pub struct Line {
    pub runs: Vec<Run>,
    pub size: f32,
    pub width: f32,
}

/// The fonts of a document.
pub struct Fonts {
    faces: Vec<Face<'static>>,
    fonts: Vec<Font>,
}

impl Fonts {
    /// Reads them; `None` if one cannot be read, which a test excludes.
    pub fn new() -> Option<Self> {
        let faces = FILES.iter().map(|file| Face::from_slice(file, 0)).collect::<Option<_>>()?;
        let fonts = FILES.iter().map(|file| Font::new((*file).into(), 0)).collect::<Option<_>>()?;
        Some(Self { faces, fonts })
    }

    /// The font of a run.
    pub fn font(&self, run: &Run) -> Font {
        self.fonts[run.font].clone()
    }

    /// One line, however long.
    pub fn line(&self, text: &str, style: Style) -> Line {
        let mut pieces: Vec<(usize, String)> = Vec::new();
        for character in text.chars() {
            let character = if character.is_whitespace() && character != '\u{a0}' { ' ' } else { character };
            if character.is_control() {
                continue;
            }
            let before = pieces.last().map(|(font, _)| *font);
            let (font, character) = self.font_of(character, style.bold, before);
            match pieces.last_mut() {
                Some((last, piece)) if *last == font => piece.push(character),
                _ => pieces.push((font, character.to_string())),
            }
        }
        let runs: Vec<Run> = pieces.into_iter().map(|(font, piece)| self.run(font, piece, style.size)).collect();
        let width = runs.iter().map(|run| run.width).sum();
        Line { runs, size: style.size, width }
    }

    /// A text in lines no wider than `width`; a word that is wider is broken.
    pub fn wrap(&self, text: &str, style: Style, width: f32) -> Vec<Line> {
        let mut lines = Vec::new();
        for paragraph in text.split('\n') {
            let mut held = String::new();
            for word in paragraph.split([' ', '\t']).filter(|word| !word.is_empty()) {
                let longer = if held.is_empty() { word.to_owned() } else { format!("{held} {word}") };
                if self.line(&longer, style).width <= width {
                    held = longer;
                    continue;
                }
                if !held.is_empty() {
                    lines.push(self.line(&held, style));
                }
                held = word.to_owned();
                while self.line(&held, style).width > width {
                    let cut = self.fitting(&held, style, width);
                    lines.push(self.line(&held[..cut], style));
                    held.drain(..cut);
                }
            }
            if !held.is_empty() {
                lines.push(self.line(&held, style));
            }
        }
        if lines.is_empty() {
            lines.push(self.line("", style));
        }
        lines
    }

    /// How many bytes of a word fit, at least one character.
    fn fitting(&self, word: &str, style: Style, width: f32) -> usize {
        let ends = word.char_indices().map(|(at, character)| at + character.len_utf8());
        let mut fits = word.chars().next().map_or(0, char::len_utf8);
        for end in ends {
            if self.line(&word[..end], style).width > width {
                break;
            }
            fits = end;
        }
        fits
    }

    /// The font for a character, that of what stands before it if that will do: marks and joiners stay with their letters.
    fn font_of(&self, character: char, bold: bool, before: Option<usize>) -> (usize, char) {
        let own = if bold { BOLD } else { REGULAR };
        let has = |font: &usize| self.faces[*font].glyph_index(character).is_some();
        let stays =
            matches!(character, ' ' | '\u{200c}' | '\u{200d}') || before.is_some_and(|font| font >= FALLBACKS.start);
        if let Some(font) = before.filter(|font| stays && !character.is_ascii_alphanumeric() && has(font)) {
            return (font, character);
        }
        match std::iter::once(own).chain(FALLBACKS).find(has) {
            Some(font) => (font, character),
            None => (own, UNKNOWN),
        }
    }

    fn run(&self, font: usize, text: String, size: f32) -> Run {
        let face = &self.faces[font];
        let scale = 1.0 / face.units_per_em() as f32;
        let mut buffer = UnicodeBuffer::new();
        buffer.push_str(&text);
        buffer.guess_segment_properties();
        let shaped = rustybuzz::shape(face, &[], buffer);
        let (infos, places) = (shaped.glyph_infos(), shaped.glyph_positions());
        let mut glyphs = Vec::with_capacity(infos.len());
        for (index, (info, place)) in infos.iter().zip(places).enumerate() {
            let start = info.cluster as usize;
            let end = infos[index..]
                .iter()
                .map(|next| next.cluster as usize)
                .find(|next| *next > start)
                .unwrap_or(text.len());
            glyphs.push(KrillaGlyph::new(
                GlyphId::new(info.glyph_id),
                place.x_advance as f32 * scale,
                place.x_offset as f32 * scale,
                place.y_offset as f32 * scale,
                place.y_advance as f32 * scale,
                start..end,
                None,
            ));
        }
        let width = places.iter().map(|place| place.x_advance as f32).sum::<f32>() * scale * size;
        Run { font, text, glyphs, width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STYLE: Style = Style { size: 10.0, bold: false };

    #[test]
    fn every_font_is_read_and_the_rupee_is_in_both_weights() {
        let fonts = Fonts::new().expect("the fonts are read");
        for bold in [false, true] {
            let line = fonts.line("₹1,23,456.78 −€£$", Style { bold, ..STYLE });
            assert_eq!(line.runs.len(), 1, "{line:?}");
            assert!(line.runs[0].glyphs.iter().all(|glyph| glyph.glyph_id.to_u32() != 0));
        }
    }

    #[test]
    fn scripts_of_india_have_their_fonts_and_others_a_sign() {
        let fonts = Fonts::new().expect("the fonts are read");
        for name in ["गणेश", "গণেশ", "ગણેશ", "ਗਣੇਸ਼", "ಗಣೇಶ", "ഗണേശ", "கணேஷ்", "గణేష్"]
        {
            let line = fonts.line(name, STYLE);
            assert_eq!(line.runs.len(), 1, "{name}");
            assert!(line.runs[0].font >= FALLBACKS.start && line.runs[0].text == name);
        }
        assert_eq!(fonts.line("漢\u{7}\n字", STYLE).runs[0].text, "\u{fffd} \u{fffd}");
        assert_eq!(fonts.line("Acme गणेश Ltd", STYLE).runs.len(), 3);
    }

    #[test]
    fn lines_are_no_wider_than_asked_and_lose_nothing() {
        let fonts = Fonts::new().expect("the fonts are read");
        let text =
            "Calls to an-extraordinarily-long-name-of-a-destination-that-nobody-would-expect, billed by the pulse";
        let lines = fonts.wrap(text, STYLE, 90.0);
        assert!(lines.len() > 4 && lines.iter().all(|line| line.width <= 90.0));
        let joined: String = lines.iter().flat_map(|line| &line.runs).map(|run| run.text.as_str()).collect();
        assert_eq!(joined.replace(' ', ""), text.replace(' ', ""));
    }
}
