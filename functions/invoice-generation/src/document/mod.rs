//! Invoices and credit notes as documents: one record, one paper, and the two forms in which a person reads it.

pub mod code;
pub mod html;
pub mod money;
pub mod paper;
pub mod pdf;
pub mod record;
mod words;

#[cfg(test)]
pub mod examples;
