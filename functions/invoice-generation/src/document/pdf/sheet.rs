//! Sheets of paper that are filled from top to bottom, and the structure that a screen reader follows through them.
//!
//! Everything is placed first and drawn afterwards: only then is it known how many pages there are.

use super::text::{Fonts, Line, Style};
use krilla::{
    Document,
    color::rgb,
    geom::{PathBuilder, Point, Rect, Size, Transform},
    image::Image,
    num::NormalizedF32,
    page::PageSettings,
    paint::Fill,
    surface::Surface,
    tagging::{Artifact, ArtifactType, ContentTag, Identifier, Node as Branch, SpanTag, TagGroup, TagKind, TagTree},
};

/// Red, green, blue.
pub type Color = [u8; 3];

/// A part of the document's structure, by its place in the list of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node(usize);

/// Where a text is to be on its line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

enum Item {
    Text { x: f32, y: f32, line: Line, color: Color, node: Option<Node> },
    Block { x: f32, y: f32, width: f32, height: f32, color: Color },
    Image { x: f32, y: f32, width: f32, height: f32, image: Image, node: Node },
}

enum Child {
    Group(usize),
    Leaf(Identifier),
}

struct Group {
    tag: TagKind,
    children: Vec<Child>,
}

/// Pages in the making.
pub struct Sheets<'a> {
    fonts: &'a Fonts,
    pages: Vec<Vec<Item>>,
    groups: Vec<Group>,
    roots: Vec<usize>,
    /// Of a page.
    pub width: f32,
    /// Of a page.
    pub height: f32,
    /// How far the current page is filled.
    pub y: f32,
}

impl<'a> Sheets<'a> {
    /// One empty page.
    pub fn new(fonts: &'a Fonts, (width, height): (f32, f32)) -> Self {
        Self { fonts, pages: vec![Vec::new()], groups: Vec::new(), roots: Vec::new(), width, height, y: 0.0 }
    }

    /// Pages so far.
    pub fn count(&self) -> usize {
        self.pages.len()
    }

    /// A further page, filled down to `y`.
    pub fn turn(&mut self, y: f32) {
        self.pages.push(Vec::new());
        self.y = y;
    }

    /// A part of the structure, below another or at its top.
    pub fn node(&mut self, tag: impl Into<TagKind>, parent: Option<Node>) -> Node {
        self.groups.push(Group { tag: tag.into(), children: Vec::new() });
        let own = self.groups.len() - 1;
        match parent {
            Some(Node(parent)) => self.groups[parent].children.push(Child::Group(own)),
            None => self.roots.push(own),
        }
        Node(own)
    }

    /// A line on the current page, its baseline at `y`; without a node it is no content, as page numbers are not.
    pub fn line(&mut self, x: f32, y: f32, side: Side, line: Line, color: Color, node: Option<Node>) {
        let page = self.pages.len() - 1;
        self.line_on(page, x, y, side, line, color, node);
    }

    /// As `line`, on a page of before.
    #[expect(clippy::too_many_arguments, reason = "a place is a page, a point and a side")]
    pub fn line_on(&mut self, page: usize, x: f32, y: f32, side: Side, line: Line, color: Color, node: Option<Node>) {
        let x = if side == Side::Right { x - line.width } else { x };
        self.pages[page].push(Item::Text { x, y, line, color, node });
    }

    /// Wrapped text below `y`, which is its top; returns where it ends.
    #[expect(clippy::too_many_arguments, reason = "a place, a width, a style and a meaning")]
    pub fn text(
        &mut self,
        x: f32,
        y: f32,
        width: f32,
        text: &str,
        style: Style,
        color: Color,
        node: Option<Node>,
    ) -> f32 {
        let mut bottom = y;
        for line in self.fonts.wrap(text, style, width) {
            self.line(x, bottom + ascent(style), Side::Left, line, color, node);
            bottom += leading(style);
        }
        bottom
    }

    /// A filled rectangle, which is ornament.
    pub fn block(&mut self, x: f32, y: f32, width: f32, height: f32, color: Color) {
        let page = self.pages.len() - 1;
        self.block_on(page, [x, y, width, height], color);
    }

    /// As `block`, on a page of before.
    pub fn block_on(&mut self, page: usize, [x, y, width, height]: [f32; 4], color: Color) {
        self.pages[page].push(Item::Block { x, y, width, height, color });
    }

    /// A picture, scaled into a width and a height; returns how high it became.
    pub fn image(&mut self, x: f32, y: f32, (width, height): (f32, f32), image: Image, node: Node) -> f32 {
        let (wide, high) = image.size();
        let scale = (width / wide.max(1) as f32).min(height / high.max(1) as f32);
        let (width, height) = (wide as f32 * scale, high as f32 * scale);
        if let Some(page) = self.pages.last_mut() {
            page.push(Item::Image { x, y, width, height, image, node });
        }
        height
    }

    /// Draws it all, and says what belongs to what.
    pub fn draw(mut self, document: &mut Document) -> Option<TagTree> {
        for page in std::mem::take(&mut self.pages) {
            let mut sheet = document.start_page_with(PageSettings::from_wh(self.width, self.height)?);
            let mut surface = sheet.surface();
            for item in page {
                self.item(&mut surface, item)?;
            }
            surface.finish();
            sheet.finish();
        }
        let mut tree = TagTree::new().with_lang(Some("en".to_owned()));
        let roots = std::mem::take(&mut self.roots);
        for root in roots {
            tree.push(self.group(root));
        }
        Some(tree)
    }

    fn item(&mut self, surface: &mut Surface<'_>, item: Item) -> Option<()> {
        match item {
            Item::Text { x, y, line, color, node } => {
                let tag = match node {
                    Some(_) => ContentTag::Span(SpanTag::empty()),
                    None => ContentTag::Artifact(Artifact::with_kind(ArtifactType::PaginationOther)),
                };
                self.tagged(surface, tag, node, |fonts, surface| {
                    surface.set_fill(Some(fill(color)));
                    let mut x = x;
                    for run in &line.runs {
                        let start = Point::from_xy(x, y);
                        surface.draw_glyphs(start, &run.glyphs, fonts.font(run), &run.text, line.size, false);
                        x += run.width;
                    }
                });
            }
            Item::Block { x, y, width, height, color } => {
                let mut path = PathBuilder::new();
                path.push_rect(Rect::from_xywh(x, y, width, height)?);
                let path = path.finish()?;
                let tag = ContentTag::Artifact(Artifact::with_kind(ArtifactType::Layout));
                self.tagged(surface, tag, None, |_, surface| {
                    surface.set_fill(Some(fill(color)));
                    surface.draw_path(&path);
                });
            }
            Item::Image { x, y, width, height, image, node } => {
                let size = Size::from_wh(width, height)?;
                self.tagged(surface, ContentTag::Other, Some(node), |_, surface| {
                    surface.push_transform(&Transform::from_translate(x, y));
                    surface.draw_image(image, size);
                    surface.pop();
                });
            }
        }
        Some(())
    }

    fn tagged(
        &mut self,
        surface: &mut Surface<'_>,
        tag: ContentTag<'_>,
        node: Option<Node>,
        draw: impl FnOnce(&Fonts, &mut Surface<'_>),
    ) {
        let leaf = surface.start_tagged(tag);
        draw(self.fonts, surface);
        surface.end_tagged();
        if let Some(Node(node)) = node {
            self.groups[node].children.push(Child::Leaf(leaf));
        }
    }

    fn group(&mut self, index: usize) -> TagGroup {
        let tag = self.groups[index].tag.clone();
        let children = std::mem::take(&mut self.groups[index].children);
        let children = children
            .into_iter()
            .map(|child| match child {
                Child::Group(group) => Branch::Group(self.group(group)),
                Child::Leaf(leaf) => Branch::Leaf(leaf),
            })
            .collect();
        TagGroup::with_children(tag, children)
    }
}

/// From the top of a line to its baseline.
pub fn ascent(style: Style) -> f32 {
    style.size * 1.02
}

/// From one baseline to the next.
pub fn leading(style: Style) -> f32 {
    style.size * 1.4
}

fn fill([red, green, blue]: Color) -> Fill {
    Fill { paint: rgb::Color::new(red, green, blue).into(), opacity: NormalizedF32::ONE, ..Fill::default() }
}
