//! What an operator does by hand, against a database.

mod accounts;
mod commands;
mod doctor;
mod restored;
