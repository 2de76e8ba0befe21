-- Every enumerated type, each in its own guarded block, so that the file may run again and a new type is added beside old ones.
-- A type's values are never removed or renamed; a new value is appended by a migration of its own.


-- The store's side: what the CallAI document names.

do $$
begin
  create type public.store_platform as enum ('shopify', 'woocommerce', 'magento', 'bigcommerce', 'custom');
exception when duplicate_object then null;
end
$$;
comment on type public.store_platform is 'Where a store runs.';

do $$
begin
  create type public.store_status as enum ('connected', 'disconnected', 'error', 'pending');
exception when duplicate_object then null;
end
$$;
comment on type public.store_status is 'Whether a store''s platform can be reached.';

do $$
begin
  create type public.setting_category as enum ('voice', 'ai', 'integration', 'notification', 'security', 'general');
exception when duplicate_object then null;
end
$$;
comment on type public.setting_category is 'What a setting of a store is about.';

do $$
begin
  create type public.product_status as enum ('active', 'draft', 'archived', 'discontinued');
exception when duplicate_object then null;
end
$$;
comment on type public.product_status is 'A product''s state in its catalogue.';

do $$
begin
  create type public.product_availability as enum ('in_stock', 'out_of_stock', 'low_stock', 'backorder', 'discontinued');
exception when duplicate_object then null;
end
$$;
comment on type public.product_availability is 'Whether a product can be had.';

do $$
begin
  create type public.order_status as enum (
    'pending', 'confirmed', 'processing', 'shipped', 'delivered', 'cancelled', 'refunded', 'returned'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.order_status is 'How far an order has come.';

do $$
begin
  create type public.payment_status as enum ('pending', 'paid', 'partially_paid', 'refunded', 'partially_refunded', 'failed', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_status is 'How far an order''s payment has come.';

do $$
begin
  create type public.fulfillment_status as enum ('unfulfilled', 'partial', 'fulfilled', 'restocked', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.fulfillment_status is 'How far an order''s delivery has come.';

do $$
begin
  create type public.call_direction as enum ('inbound', 'outbound');
exception when duplicate_object then null;
end
$$;
comment on type public.call_direction is 'Who dialled: the callee''s view of a leg.';

do $$
begin
  create type public.call_status as enum ('initiated', 'ringing', 'answered', 'completed', 'failed', 'busy', 'no_answer', 'cancelled');
exception when duplicate_object then null;
end
$$;
comment on type public.call_status is 'A store''s view of a call; derived from attempt_status and call_outcome.';

do $$
begin
  create type public.conversation_channel as enum ('voice', 'chat', 'email', 'sms', 'whatsapp');
exception when duplicate_object then null;
end
$$;
comment on type public.conversation_channel is 'How a conversation is held.';

do $$
begin
  create type public.conversation_status as enum ('active', 'paused', 'completed', 'escalated', 'abandoned', 'resolved');
exception when duplicate_object then null;
end
$$;
comment on type public.conversation_status is 'A conversation''s state.';

do $$
begin
  create type public.message_role as enum ('customer', 'ai_assistant', 'human_agent', 'system');
exception when duplicate_object then null;
end
$$;
comment on type public.message_role is 'Who said it.';

do $$
begin
  create type public.message_type as enum ('text', 'audio', 'image', 'file', 'system_event', 'action_result');
exception when duplicate_object then null;
end
$$;
comment on type public.message_type is 'What a message carries.';


-- Tenancy and people.

do $$
begin
  create type public.user_status as enum ('invited', 'active', 'suspended', 'archived');
exception when duplicate_object then null;
end
$$;
comment on type public.user_status is 'Only an active user has an organization in the eyes of row level security.';

do $$
begin
  create type public.org_tier as enum ('free', 'starter', 'pro', 'enterprise');
exception when duplicate_object then null;
end
$$;
comment on type public.org_tier is 'The size of plan that an organization is on, for display; the subscription decides.';

do $$
begin
  create type public.system_role as enum ('owner', 'admin', 'member', 'platform_admin');
exception when duplicate_object then null;
end
$$;
comment on type public.system_role is 'What a user is without a role of their own: it chooses the default permissions.';


-- Campaigns and calling.

do $$
begin
  create type public.campaign_status as enum ('draft', 'scheduled', 'running', 'paused', 'completed', 'cancelled', 'archived', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.campaign_status is 'Changes only along private.campaign_transitions.';

do $$
begin
  create type public.campaign_lead_status as enum ('enrolled', 'queued', 'calling', 'called', 'failed', 'opted_out', 'skipped', 'archived');
exception when duplicate_object then null;
end
$$;
comment on type public.campaign_lead_status is 'A lead in one campaign; the last five are terminal.';

do $$
begin
  create type public.queue_status as enum ('queued', 'processing', 'completed', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.queue_status is 'queued: waits for its time; processing: an attempt is under way; the others are terminal.';

do $$
begin
  create type public.attempt_status as enum (
    'created', 'submitting', 'submission_unknown', 'queued', 'initiated', 'ringing', 'in_progress', 'ended'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.attempt_status is 'One dial attempt. The order is the rank: an attempt only moves forward, and ended absorbs.';

do $$
begin
  create type public.call_outcome as enum (
    'answered', 'machine', 'busy', 'no_answer', 'rejected', 'invalid_number', 'cancelled', 'capacity', 'carrier_transient',
    'spam_blocked', 'our_fault', 'config', 'lost', 'expired', 'failed'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.call_outcome is 'Why an attempt ended, one vocabulary for every carrier.';

do $$
begin
  create type public.carrier_provider as enum ('plivo', 'twilio', 'telnyx', 'vonage');
exception when duplicate_object then null;
end
$$;
comment on type public.carrier_provider is 'Whose protocol a carrier account speaks.';


-- Plans, subscriptions and money.

do $$
begin
  create type public.subscription_status as enum ('trialing', 'active', 'past_due', 'suspended', 'paused', 'cancelled', 'inactive');
exception when duplicate_object then null;
end
$$;
comment on type public.subscription_status is 'A subscription''s state; an overdue invoice is derived from its due date instead.';

do $$
begin
  create type public.billing_cycle as enum ('monthly', 'quarterly', 'yearly');
exception when duplicate_object then null;
end
$$;
comment on type public.billing_cycle is 'How long a billing period is.';

do $$
begin
  create type public.invoice_status as enum ('draft', 'open', 'paid', 'void', 'uncollectible');
exception when duplicate_object then null;
end
$$;
comment on type public.invoice_status is 'An invoice is immutable from open on, but for its payment.';

do $$
begin
  create type public.payment_method_type as enum ('card', 'upi', 'bank_transfer', 'razorpay', 'stripe');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_method_type is 'How an organization pays.';


-- The system.

do $$
begin
  create type public.event_status as enum ('applied', 'ignored', 'orphan', 'failed', 'dead');
exception when duplicate_object then null;
end
$$;
comment on type public.event_status is 'What became of an event from outside. failed is tried again, dead waits for a person.';

do $$
begin
  create type public.credit_transaction_type as enum (
    'purchase', 'monthly_grant', 'promotional_grant', 'consumption', 'refund', 'adjustment', 'expiry'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.credit_transaction_type is 'Why prepaid credit came or went.';

do $$
begin
  create type public.credit_account_kind as enum (
    'monthly', 'promotional', 'purchased', 'payments', 'grants', 'consumption', 'expiry', 'adjustments'
  );
exception when duplicate_object then null;
end
$$;
comment on type public.credit_account_kind is
  'The accounts of prepaid credit: the first three hold it and are used up in this order, the others say where it came from or went.';

do $$
begin
  create type public.ledger_side as enum ('debit', 'credit');
exception when duplicate_object then null;
end
$$;
comment on type public.ledger_side is 'The side of an account on which an entry stands: a credit adds to what it holds, a debit takes from it.';

do $$
begin
  create type public.payment_gateway as enum ('razorpay', 'stripe', 'manual');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_gateway is 'Who moved the money; manual is a transfer that a person saw on the bank statement.';

do $$
begin
  create type public.payment_transaction_status as enum ('pending', 'authorized', 'failed', 'captured', 'refunded');
exception when duplicate_object then null;
end
$$;
comment on type public.payment_transaction_status is
  'One payment at a gateway. The first three may follow each other; captured is money that came, and only a full refund follows it.';

do $$
begin
  create type public.refund_status as enum ('pending', 'processed', 'failed');
exception when duplicate_object then null;
end
$$;
comment on type public.refund_status is 'One refund at a gateway; the last two are terminal.';

do $$
begin
  create type public.credit_note_status as enum ('draft', 'issued');
exception when duplicate_object then null;
end
$$;
comment on type public.credit_note_status is 'A credit note is immutable once it is issued.';
