-- Policies and conversations are read the short way.

set local lock_timeout = '5s';
set local statement_timeout = '60s';

-- A policy's helper is planned once a connection: the plan for the values at hand, which PostgreSQL makes the first five times, costs
-- ten times what the look-up itself does.
alter function private.org_with(text) set plan_cache_mode = force_generic_plan;

-- Who reads a conversation names it and not its store: the index that orders its messages is found by that alone. The wider promise
-- of the new key replaces the old one, in one transaction.
-- squawk-ignore ban-drop-constraint
alter table public.conversation_messages drop constraint conversation_messages_organization_id_store_id_conversation_key;
-- Only the name that PostgreSQL gave it changes, to what a new database has.
-- squawk-ignore renaming-object
alter table public.conversation_messages rename constraint conversation_messages_organization_id_store_id_conversatio_key1 to conversation_messages_organization_id_store_id_conversation_key;
-- One scan of a table that nobody writes to before stores are connected.
-- squawk-ignore constraint-missing-not-valid, disallowed-unique-constraint
alter table public.conversation_messages add unique (organization_id, conversation_id, message_index);
