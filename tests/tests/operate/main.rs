//! What an operator does by hand, against a database.

mod commands;
mod doctor;
mod restored;
