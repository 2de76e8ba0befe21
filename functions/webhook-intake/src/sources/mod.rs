//! Who may tell us something. A source is a file here, and a line in the function's routes.

pub mod carriers;
