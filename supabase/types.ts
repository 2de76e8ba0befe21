export type Json = string | number | boolean | null | { [key: string]: Json | undefined } | Json[]

export type Database = {
  
  "public": {
          Tables: {
            "api_keys": {
                  Row: {
                    "created_at": string,"created_by": string | null,"id": string,"last_used_at": string | null,"name": string,"organization_id": string,"prefix": string,"revoked_at": string | null,"scopes": (string)[],"sha256": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"created_by"?: string | null,"id"?: string,"last_used_at"?: string | null,"name": string,"organization_id": string,"prefix": string,"revoked_at"?: string | null,"scopes": (string)[],"sha256": string
                  }
                  Update: {
                    "created_at"?: string,"created_by"?: string | null,"id"?: string,"last_used_at"?: string | null,"name"?: string,"organization_id"?: string,"prefix"?: string,"revoked_at"?: string | null,"scopes"?: (string)[],"sha256"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "api_keys_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "api_keys_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"audit_logs": {
                  Row: {
                    "action": string,"created_at": string,"entity_id": string | null,"entity_type": string | null,"id": string,"impersonation_session_id": string | null,"impersonator_user_id": string | null,"is_impersonated": boolean,"metadata": NonNullable<Json>,"organization_id": string,"user_id": string | null,"user_name": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "action": string,"created_at"?: string,"entity_id"?: string | null,"entity_type"?: string | null,"id"?: string,"impersonation_session_id"?: string | null,"impersonator_user_id"?: string | null,"is_impersonated"?: boolean,"metadata"?: NonNullable<Json>,"organization_id": string,"user_id"?: string | null,"user_name"?: string | null
                  }
                  Update: {
                    "action"?: string,"created_at"?: string,"entity_id"?: string | null,"entity_type"?: string | null,"id"?: string,"impersonation_session_id"?: string | null,"impersonator_user_id"?: string | null,"is_impersonated"?: boolean,"metadata"?: NonNullable<Json>,"organization_id"?: string,"user_id"?: string | null,"user_name"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "audit_logs_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"call_analytics": {
                  Row: {
                    "ai_resolution_rate": number | null,"answered_calls": number,"average_call_duration": number | null,"average_quality_score": number | null,"average_response_time_ms": number | null,"average_satisfaction_rating": number | null,"created_at": string,"date_period": string,"dropped_calls": number,"hour_period": number | null,"human_escalation_rate": number | null,"id": string,"inbound_calls": number,"missed_calls": number,"organization_id": string,"outbound_calls": number,"resolution_categories": NonNullable<Json>,"store_id": string,"top_intents": NonNullable<Json>,"total_calls": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "ai_resolution_rate"?: number | null,"answered_calls"?: number,"average_call_duration"?: number | null,"average_quality_score"?: number | null,"average_response_time_ms"?: number | null,"average_satisfaction_rating"?: number | null,"created_at"?: string,"date_period": string,"dropped_calls"?: number,"hour_period"?: number | null,"human_escalation_rate"?: number | null,"id"?: string,"inbound_calls"?: number,"missed_calls"?: number,"organization_id": string,"outbound_calls"?: number,"resolution_categories"?: NonNullable<Json>,"store_id": string,"top_intents"?: NonNullable<Json>,"total_calls"?: number,"updated_at"?: string
                  }
                  Update: {
                    "ai_resolution_rate"?: number | null,"answered_calls"?: number,"average_call_duration"?: number | null,"average_quality_score"?: number | null,"average_response_time_ms"?: number | null,"average_satisfaction_rating"?: number | null,"created_at"?: string,"date_period"?: string,"dropped_calls"?: number,"hour_period"?: number | null,"human_escalation_rate"?: number | null,"id"?: string,"inbound_calls"?: number,"missed_calls"?: number,"organization_id"?: string,"outbound_calls"?: number,"resolution_categories"?: NonNullable<Json>,"store_id"?: string,"top_intents"?: NonNullable<Json>,"total_calls"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "call_analytics_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"call_charges": {
                  Row: {
                    "call_log_id": string,"charged_minor": number,"created_at": string,"credit_seconds": number,"currency": string,"day": string,"meter_key": string,"organization_id": string,"overage_seconds": number,"plan_price_id": string,"seconds": number,"transaction_id": string | null,"uncollected_minor": number
                  }
                  ComputedFields: never
                  Insert: {
                    "call_log_id": string,"charged_minor": number,"created_at": string,"credit_seconds": number,"currency": string,"day": string,"meter_key": string,"organization_id": string,"overage_seconds"?: number,"plan_price_id": string,"seconds": number,"transaction_id"?: string | null,"uncollected_minor"?: number
                  }
                  Update: {
                    "call_log_id"?: string,"charged_minor"?: number,"created_at"?: string,"credit_seconds"?: number,"currency"?: string,"day"?: string,"meter_key"?: string,"organization_id"?: string,"overage_seconds"?: number,"plan_price_id"?: string,"seconds"?: number,"transaction_id"?: string | null,"uncollected_minor"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "call_charges_call_fkey"
      columns: ["organization_id","call_log_id"]
isOneToOne: false
      referencedRelation: "call_logs"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_charges_meter_key_fkey"
      columns: ["meter_key"]
isOneToOne: false
      referencedRelation: "meters"
      referencedColumns: ["key"]
    },{
      foreignKeyName: "call_charges_plan_price_id_fkey"
      columns: ["plan_price_id"]
isOneToOne: false
      referencedRelation: "plan_prices"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "call_charges_transaction_fkey"
      columns: ["organization_id","transaction_id"]
isOneToOne: false
      referencedRelation: "credit_transactions"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"call_credits": {
                  Row: {
                    "balance_minor": number,"created_at": string,"currency": string,"held_minor": number,"id": string,"last_number": number,"low_balance_minor": number | null,"organization_id": string,"total_consumed_minor": number,"total_purchased_minor": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "balance_minor"?: number,"created_at"?: string,"currency": string,"held_minor"?: number,"id"?: string,"last_number"?: number,"low_balance_minor"?: number | null,"organization_id": string,"total_consumed_minor"?: number,"total_purchased_minor"?: number,"updated_at"?: string
                  }
                  Update: {
                    "balance_minor"?: number,"created_at"?: string,"currency"?: string,"held_minor"?: number,"id"?: string,"last_number"?: number,"low_balance_minor"?: number | null,"organization_id"?: string,"total_consumed_minor"?: number,"total_purchased_minor"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "call_credits_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"call_logs": {
                  Row: {
                    "agent_call_id": string | null,"agent_id": string | null,"ai_analysis": Json | null,"answered_at": string | null,"attempt_no": number,"begun_at": string | null,"bill_duration_seconds": number | null,"call_sid": string | null,"call_status": Database["public"]['Enums']["call_outcome"] | null,"callee_number": string,"caller_id": string | null,"caller_number": string,"campaign_id": string | null,"carrier_account_id": string,"carrier_cost_currency": string | null,"carrier_cost_micros": number | null,"conversation_transcript": string | null,"created_at": string,"dialled": boolean,"direction": Database["public"]['Enums']["call_direction"],"disconnect_notes": string | null,"disconnect_reason": string | null,"duration": number | null,"ended_at": string | null,"erased_at": string | null,"first_audio_ms": number | null,"hangup_cause_code": string | null,"hangup_cause_name": string | null,"hangup_source": string | null,"id": string,"interest_level": string | null,"lead_id": string | null,"lease_token": string | null,"lease_until": string | null,"machine": boolean | null,"metadata": NonNullable<Json>,"not_after": string | null,"notes": string | null,"organization_id": string,"project_id": string | null,"queue_id": string | null,"record_call": boolean,"recording_id": string | null,"recording_seconds": number | null,"recording_url": string | null,"refusal_reason": string | null,"ring_timeout_seconds": number,"ringing_at": string | null,"sentiment_score": number | null,"status": Database["public"]['Enums']["attempt_status"],"stream_error": string | null,"stream_id": string | null,"stream_status": string | null,"submitted_at": string | null,"summary": string | null,"time_limit_seconds": number,"transfer_department": string | null,"transfer_reason": string | null,"transfer_sid": string | null,"transfer_status": string | null,"transferred": boolean,"transferred_at": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "agent_call_id"?: string | null,"agent_id"?: string | null,"ai_analysis"?: Json | null,"answered_at"?: string | null,"attempt_no"?: number,"begun_at"?: string | null,"bill_duration_seconds"?: number | null,"call_sid"?: string | null,"call_status"?: Database["public"]['Enums']["call_outcome"] | null,"callee_number": string,"caller_id"?: string | null,"caller_number": string,"campaign_id"?: string | null,"carrier_account_id": string,"carrier_cost_currency"?: string | null,"carrier_cost_micros"?: number | null,"conversation_transcript"?: string | null,"created_at"?: string,"dialled"?: boolean,"direction"?: Database["public"]['Enums']["call_direction"],"disconnect_notes"?: string | null,"disconnect_reason"?: string | null,"duration"?: number | null,"ended_at"?: string | null,"erased_at"?: string | null,"first_audio_ms"?: number | null,"hangup_cause_code"?: string | null,"hangup_cause_name"?: string | null,"hangup_source"?: string | null,"id"?: string,"interest_level"?: string | null,"lead_id"?: string | null,"lease_token"?: string | null,"lease_until"?: string | null,"machine"?: boolean | null,"metadata"?: NonNullable<Json>,"not_after"?: string | null,"notes"?: string | null,"organization_id": string,"project_id"?: string | null,"queue_id"?: string | null,"record_call"?: boolean,"recording_id"?: string | null,"recording_seconds"?: number | null,"recording_url"?: string | null,"refusal_reason"?: string | null,"ring_timeout_seconds"?: number,"ringing_at"?: string | null,"sentiment_score"?: number | null,"status"?: Database["public"]['Enums']["attempt_status"],"stream_error"?: string | null,"stream_id"?: string | null,"stream_status"?: string | null,"submitted_at"?: string | null,"summary"?: string | null,"time_limit_seconds"?: number,"transfer_department"?: string | null,"transfer_reason"?: string | null,"transfer_sid"?: string | null,"transfer_status"?: string | null,"transferred"?: boolean,"transferred_at"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "agent_call_id"?: string | null,"agent_id"?: string | null,"ai_analysis"?: Json | null,"answered_at"?: string | null,"attempt_no"?: number,"begun_at"?: string | null,"bill_duration_seconds"?: number | null,"call_sid"?: string | null,"call_status"?: Database["public"]['Enums']["call_outcome"] | null,"callee_number"?: string,"caller_id"?: string | null,"caller_number"?: string,"campaign_id"?: string | null,"carrier_account_id"?: string,"carrier_cost_currency"?: string | null,"carrier_cost_micros"?: number | null,"conversation_transcript"?: string | null,"created_at"?: string,"dialled"?: boolean,"direction"?: Database["public"]['Enums']["call_direction"],"disconnect_notes"?: string | null,"disconnect_reason"?: string | null,"duration"?: number | null,"ended_at"?: string | null,"erased_at"?: string | null,"first_audio_ms"?: number | null,"hangup_cause_code"?: string | null,"hangup_cause_name"?: string | null,"hangup_source"?: string | null,"id"?: string,"interest_level"?: string | null,"lead_id"?: string | null,"lease_token"?: string | null,"lease_until"?: string | null,"machine"?: boolean | null,"metadata"?: NonNullable<Json>,"not_after"?: string | null,"notes"?: string | null,"organization_id"?: string,"project_id"?: string | null,"queue_id"?: string | null,"record_call"?: boolean,"recording_id"?: string | null,"recording_seconds"?: number | null,"recording_url"?: string | null,"refusal_reason"?: string | null,"ring_timeout_seconds"?: number,"ringing_at"?: string | null,"sentiment_score"?: number | null,"status"?: Database["public"]['Enums']["attempt_status"],"stream_error"?: string | null,"stream_id"?: string | null,"stream_status"?: string | null,"submitted_at"?: string | null,"summary"?: string | null,"time_limit_seconds"?: number,"transfer_department"?: string | null,"transfer_reason"?: string | null,"transfer_sid"?: string | null,"transfer_status"?: string | null,"transferred"?: boolean,"transferred_at"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "call_logs_carrier_account_id_fkey"
      columns: ["carrier_account_id"]
isOneToOne: false
      referencedRelation: "carrier_accounts"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "call_logs_organization_id_caller_id_fkey"
      columns: ["organization_id","caller_id"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_logs_organization_id_campaign_id_fkey"
      columns: ["organization_id","campaign_id"]
isOneToOne: false
      referencedRelation: "campaigns"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_logs_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "call_logs_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_logs_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_logs_organization_id_queue_id_fkey"
      columns: ["organization_id","queue_id"]
isOneToOne: false
      referencedRelation: "call_queue"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"call_queue": {
                  Row: {
                    "attempt_count": number,"campaign_id": string,"created_at": string,"dial_class": number,"dispatch_count": number,"id": string,"last_error": string | null,"lead_id": string,"max_attempts": number,"metadata": NonNullable<Json>,"next_retry_at": string,"organization_id": string,"priority": number,"status": Database["public"]['Enums']["queue_status"],"updated_at": string,"wait_reason": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "attempt_count"?: number,"campaign_id": string,"created_at"?: string,"dial_class"?: number,"dispatch_count"?: number,"id"?: string,"last_error"?: string | null,"lead_id": string,"max_attempts"?: number,"metadata"?: NonNullable<Json>,"next_retry_at": string,"organization_id": string,"priority"?: number,"status"?: Database["public"]['Enums']["queue_status"],"updated_at"?: string,"wait_reason"?: string | null
                  }
                  Update: {
                    "attempt_count"?: number,"campaign_id"?: string,"created_at"?: string,"dial_class"?: number,"dispatch_count"?: number,"id"?: string,"last_error"?: string | null,"lead_id"?: string,"max_attempts"?: number,"metadata"?: NonNullable<Json>,"next_retry_at"?: string,"organization_id"?: string,"priority"?: number,"status"?: Database["public"]['Enums']["queue_status"],"updated_at"?: string,"wait_reason"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "call_queue_organization_id_campaign_id_fkey"
      columns: ["organization_id","campaign_id"]
isOneToOne: false
      referencedRelation: "campaigns"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "call_queue_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "call_queue_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"caller_numbers": {
                  Row: {
                    "carrier_account_id": string,"created_at": string,"daily_calls": number | null,"id": string,"is_active": boolean,"organization_id": string,"phone_number": string,"registration_id": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "carrier_account_id": string,"created_at"?: string,"daily_calls"?: number | null,"id"?: string,"is_active"?: boolean,"organization_id": string,"phone_number": string,"registration_id"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "carrier_account_id"?: string,"created_at"?: string,"daily_calls"?: number | null,"id"?: string,"is_active"?: boolean,"organization_id"?: string,"phone_number"?: string,"registration_id"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "caller_numbers_carrier_account_id_fkey"
      columns: ["carrier_account_id"]
isOneToOne: false
      referencedRelation: "carrier_accounts"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "caller_numbers_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"calling_holidays": {
                  Row: {
                    "day": string,"evidence": string,"jurisdiction": string,"name": string
                  }
                  ComputedFields: never
                  Insert: {
                    "day": string,"evidence"?: string,"jurisdiction": string,"name": string
                  }
                  Update: {
                    "day"?: string,"evidence"?: string,"jurisdiction"?: string,"name"?: string
                  }
                  Relationships: [
                    
                  ]
                },"calling_hours": {
                  Row: {
                    "basis": string,"closes": string | null,"daily_calls": number | null,"evidence": string,"jurisdiction": string,"on_holidays": boolean,"opens": string | null,"purpose": string,"weekday": number
                  }
                  ComputedFields: never
                  Insert: {
                    "basis": string,"closes"?: string | null,"daily_calls"?: number | null,"evidence"?: string,"jurisdiction": string,"on_holidays"?: boolean,"opens"?: string | null,"purpose": string,"weekday": number
                  }
                  Update: {
                    "basis"?: string,"closes"?: string | null,"daily_calls"?: number | null,"evidence"?: string,"jurisdiction"?: string,"on_holidays"?: boolean,"opens"?: string | null,"purpose"?: string,"weekday"?: number
                  }
                  Relationships: [
                    
                  ]
                },"calls": {
                  Row: {
                    "ai_context": NonNullable<Json>,"ai_summary": string | null,"answered_at": string | null,"attempt_status": Database["public"]['Enums']["attempt_status"],"call_id": string | null,"call_log_id": string | null,"call_outcome": Database["public"]['Enums']["call_outcome"] | null,"conversation_id": string | null,"created_at": string,"customer_id": string | null,"direction": Database["public"]['Enums']["call_direction"],"dropped_call": boolean,"duration_seconds": number | null,"end_time": string | null,"from_phone": string,"id": string,"intent_detected": string | null,"order_id": string | null,"organization_id": string,"quality_score": number | null,"recording_sid": string | null,"recording_url": string | null,"satisfaction_rating": number | null,"sentiment_score": number | null,"start_time": string,"status": Database["public"]['Enums']["call_status"],"store_id": string,"to_phone": string,"transcript": string | null,"transcript_confidence": number | null,"twilio_call_sid": string | null,"twilio_data": NonNullable<Json>,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "ai_context"?: NonNullable<Json>,"ai_summary"?: string | null,"answered_at"?: string | null,"attempt_status"?: Database["public"]['Enums']["attempt_status"],"call_id"?: string | null,"call_log_id"?: string | null,"call_outcome"?: Database["public"]['Enums']["call_outcome"] | null,"conversation_id"?: string | null,"created_at"?: string,"customer_id"?: string | null,"direction": Database["public"]['Enums']["call_direction"],"dropped_call"?: boolean,"duration_seconds"?: number | null,"end_time"?: string | null,"from_phone": string,"id"?: string,"intent_detected"?: string | null,"order_id"?: string | null,"organization_id"?: string,"quality_score"?: number | null,"recording_sid"?: string | null,"recording_url"?: string | null,"satisfaction_rating"?: number | null,"sentiment_score"?: number | null,"start_time": string,"status"?: never,"store_id": string,"to_phone": string,"transcript"?: string | null,"transcript_confidence"?: number | null,"twilio_call_sid"?: string | null,"twilio_data"?: NonNullable<Json>,"updated_at"?: string
                  }
                  Update: {
                    "ai_context"?: NonNullable<Json>,"ai_summary"?: string | null,"answered_at"?: string | null,"attempt_status"?: Database["public"]['Enums']["attempt_status"],"call_id"?: string | null,"call_log_id"?: string | null,"call_outcome"?: Database["public"]['Enums']["call_outcome"] | null,"conversation_id"?: string | null,"created_at"?: string,"customer_id"?: string | null,"direction"?: Database["public"]['Enums']["call_direction"],"dropped_call"?: boolean,"duration_seconds"?: number | null,"end_time"?: string | null,"from_phone"?: string,"id"?: string,"intent_detected"?: string | null,"order_id"?: string | null,"organization_id"?: string,"quality_score"?: number | null,"recording_sid"?: string | null,"recording_url"?: string | null,"satisfaction_rating"?: number | null,"sentiment_score"?: number | null,"start_time"?: string,"status"?: never,"store_id"?: string,"to_phone"?: string,"transcript"?: string | null,"transcript_confidence"?: number | null,"twilio_call_sid"?: string | null,"twilio_data"?: NonNullable<Json>,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "calls_organization_id_call_log_id_fkey"
      columns: ["organization_id","call_log_id"]
isOneToOne: true
      referencedRelation: "call_logs"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "calls_organization_id_store_id_conversation_id_fkey"
      columns: ["organization_id","store_id","conversation_id"]
isOneToOne: false
      referencedRelation: "conversations"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "calls_organization_id_store_id_customer_id_fkey"
      columns: ["organization_id","store_id","customer_id"]
isOneToOne: false
      referencedRelation: "customers"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "calls_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "calls_organization_id_store_id_order_id_fkey"
      columns: ["organization_id","store_id","order_id"]
isOneToOne: false
      referencedRelation: "orders"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"campaign_leads": {
                  Row: {
                    "attempt_count": number,"call_log_id": string | null,"campaign_id": string,"created_at": string,"enrolled_at": string,"enrolled_by": string | null,"id": string,"last_call_attempt_at": string | null,"lead_id": string,"opt_out_reason": string | null,"opted_out_at": string | null,"organization_id": string,"skip_reason": string | null,"status": Database["public"]['Enums']["campaign_lead_status"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "attempt_count"?: number,"call_log_id"?: string | null,"campaign_id": string,"created_at"?: string,"enrolled_at"?: string,"enrolled_by"?: string | null,"id"?: string,"last_call_attempt_at"?: string | null,"lead_id": string,"opt_out_reason"?: string | null,"opted_out_at"?: string | null,"organization_id": string,"skip_reason"?: string | null,"status"?: Database["public"]['Enums']["campaign_lead_status"],"updated_at"?: string
                  }
                  Update: {
                    "attempt_count"?: number,"call_log_id"?: string | null,"campaign_id"?: string,"created_at"?: string,"enrolled_at"?: string,"enrolled_by"?: string | null,"id"?: string,"last_call_attempt_at"?: string | null,"lead_id"?: string,"opt_out_reason"?: string | null,"opted_out_at"?: string | null,"organization_id"?: string,"skip_reason"?: string | null,"status"?: Database["public"]['Enums']["campaign_lead_status"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "campaign_leads_organization_id_campaign_id_fkey"
      columns: ["organization_id","campaign_id"]
isOneToOne: false
      referencedRelation: "campaigns"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "campaign_leads_organization_id_enrolled_by_fkey"
      columns: ["organization_id","enrolled_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "campaign_leads_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "campaign_leads_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"campaigns": {
                  Row: {
                    "agent_id": string | null,"ai_script": string | null,"answered_calls": number,"archived_at": string | null,"auto_complete": boolean,"call_settings": NonNullable<Json>,"cancelled_at": string | null,"completed_at": string | null,"created_at": string,"created_by": string | null,"credit_cap": number | null,"credit_spent": number,"description": string | null,"dialling_enabled": boolean,"end_date": string | null,"id": string,"lead_filter": NonNullable<Json>,"max_attempts": number,"max_call_seconds": number,"max_concurrent_calls": number,"metadata": NonNullable<Json>,"name": string,"open_leads": number,"organization_id": string,"pause_reason": string | null,"paused_at": string | null,"project_id": string | null,"purpose": string,"record_calls": boolean,"retry_rules": NonNullable<Json>,"ring_timeout_seconds": number,"start_date": string | null,"started_at": string | null,"status": Database["public"]['Enums']["campaign_status"],"time_end": string,"time_start": string,"timezone": string,"total_calls": number,"total_enrolled": number,"transferred_calls": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "agent_id"?: string | null,"ai_script"?: string | null,"answered_calls"?: number,"archived_at"?: string | null,"auto_complete"?: boolean,"call_settings"?: NonNullable<Json>,"cancelled_at"?: string | null,"completed_at"?: string | null,"created_at"?: string,"created_by"?: string | null,"credit_cap"?: number | null,"credit_spent"?: number,"description"?: string | null,"dialling_enabled"?: boolean,"end_date"?: string | null,"id"?: string,"lead_filter"?: NonNullable<Json>,"max_attempts"?: number,"max_call_seconds"?: number,"max_concurrent_calls"?: number,"metadata"?: NonNullable<Json>,"name": string,"open_leads"?: number,"organization_id"?: string,"pause_reason"?: string | null,"paused_at"?: string | null,"project_id"?: string | null,"purpose"?: string,"record_calls"?: boolean,"retry_rules"?: NonNullable<Json>,"ring_timeout_seconds"?: number,"start_date"?: string | null,"started_at"?: string | null,"status"?: Database["public"]['Enums']["campaign_status"],"time_end"?: string,"time_start"?: string,"timezone"?: string,"total_calls"?: number,"total_enrolled"?: number,"transferred_calls"?: number,"updated_at"?: string
                  }
                  Update: {
                    "agent_id"?: string | null,"ai_script"?: string | null,"answered_calls"?: number,"archived_at"?: string | null,"auto_complete"?: boolean,"call_settings"?: NonNullable<Json>,"cancelled_at"?: string | null,"completed_at"?: string | null,"created_at"?: string,"created_by"?: string | null,"credit_cap"?: number | null,"credit_spent"?: number,"description"?: string | null,"dialling_enabled"?: boolean,"end_date"?: string | null,"id"?: string,"lead_filter"?: NonNullable<Json>,"max_attempts"?: number,"max_call_seconds"?: number,"max_concurrent_calls"?: number,"metadata"?: NonNullable<Json>,"name"?: string,"open_leads"?: number,"organization_id"?: string,"pause_reason"?: string | null,"paused_at"?: string | null,"project_id"?: string | null,"purpose"?: string,"record_calls"?: boolean,"retry_rules"?: NonNullable<Json>,"ring_timeout_seconds"?: number,"start_date"?: string | null,"started_at"?: string | null,"status"?: Database["public"]['Enums']["campaign_status"],"time_end"?: string,"time_start"?: string,"timezone"?: string,"total_calls"?: number,"total_enrolled"?: number,"transferred_calls"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "campaigns_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "campaigns_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "campaigns_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"carrier_accounts": {
                  Row: {
                    "account_sid": string,"api_base": string,"created_at": string,"credentials_sealed": string,"dialling_enabled": boolean,"id": string,"is_active": boolean,"max_calls_per_second": number | null,"max_concurrent_calls": number,"name": string | null,"organization_id": string | null,"provider": Database["public"]['Enums']["carrier_provider"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "account_sid": string,"api_base": string,"created_at"?: string,"credentials_sealed": string,"dialling_enabled"?: boolean,"id"?: string,"is_active"?: boolean,"max_calls_per_second"?: number | null,"max_concurrent_calls"?: number,"name"?: string | null,"organization_id"?: string | null,"provider": Database["public"]['Enums']["carrier_provider"],"updated_at"?: string
                  }
                  Update: {
                    "account_sid"?: string,"api_base"?: string,"created_at"?: string,"credentials_sealed"?: string,"dialling_enabled"?: boolean,"id"?: string,"is_active"?: boolean,"max_calls_per_second"?: number | null,"max_concurrent_calls"?: number,"name"?: string | null,"organization_id"?: string | null,"provider"?: Database["public"]['Enums']["carrier_provider"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "carrier_accounts_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"consents": {
                  Row: {
                    "consent_text": string,"created_at": string,"created_by": string | null,"expires_at": string | null,"granted_at": string,"id": string,"lead_id": string | null,"organization_id": string,"phone_number": string,"proof": NonNullable<Json>,"revoke_reason": string | null,"revoked_at": string | null,"scope": string,"source": string
                  }
                  ComputedFields: never
                  Insert: {
                    "consent_text": string,"created_at"?: string,"created_by"?: string | null,"expires_at"?: string | null,"granted_at"?: string,"id"?: string,"lead_id"?: string | null,"organization_id"?: string,"phone_number": string,"proof": NonNullable<Json>,"revoke_reason"?: string | null,"revoked_at"?: string | null,"scope": string,"source": string
                  }
                  Update: {
                    "consent_text"?: string,"created_at"?: string,"created_by"?: string | null,"expires_at"?: string | null,"granted_at"?: string,"id"?: string,"lead_id"?: string | null,"organization_id"?: string,"phone_number"?: string,"proof"?: NonNullable<Json>,"revoke_reason"?: string | null,"revoked_at"?: string | null,"scope"?: string,"source"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "consents_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "consents_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "consents_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"conversation_messages": {
                  Row: {
                    "ai_metadata": NonNullable<Json>,"ai_model": string | null,"ai_prompt": string | null,"attachments": NonNullable<Json>,"content": string,"content_type": string,"conversation_id": string,"created_at": string,"entities": Json | null,"external_message_id": string | null,"id": string,"intent": string | null,"message_index": number,"organization_id": string,"platform_data": NonNullable<Json>,"processed_at": string | null,"processing_time_ms": number | null,"role": Database["public"]['Enums']["message_role"],"sentiment_score": number | null,"store_id": string,"timestamp": string,"type": Database["public"]['Enums']["message_type"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "ai_metadata"?: NonNullable<Json>,"ai_model"?: string | null,"ai_prompt"?: string | null,"attachments"?: NonNullable<Json>,"content": string,"content_type"?: string,"conversation_id": string,"created_at"?: string,"entities"?: Json | null,"external_message_id"?: string | null,"id"?: string,"intent"?: string | null,"message_index": number,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"processed_at"?: string | null,"processing_time_ms"?: number | null,"role": Database["public"]['Enums']["message_role"],"sentiment_score"?: number | null,"store_id": string,"timestamp"?: string,"type"?: Database["public"]['Enums']["message_type"],"updated_at"?: string
                  }
                  Update: {
                    "ai_metadata"?: NonNullable<Json>,"ai_model"?: string | null,"ai_prompt"?: string | null,"attachments"?: NonNullable<Json>,"content"?: string,"content_type"?: string,"conversation_id"?: string,"created_at"?: string,"entities"?: Json | null,"external_message_id"?: string | null,"id"?: string,"intent"?: string | null,"message_index"?: number,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"processed_at"?: string | null,"processing_time_ms"?: number | null,"role"?: Database["public"]['Enums']["message_role"],"sentiment_score"?: number | null,"store_id"?: string,"timestamp"?: string,"type"?: Database["public"]['Enums']["message_type"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "conversation_messages_organization_id_store_id_conversatio_fkey"
      columns: ["organization_id","store_id","conversation_id"]
isOneToOne: false
      referencedRelation: "conversations"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"conversations": {
                  Row: {
                    "ai_context": NonNullable<Json>,"assigned_agent_id": string | null,"channel": Database["public"]['Enums']["conversation_channel"],"conversation_history": NonNullable<Json>,"conversation_key": string,"created_at": string,"customer_id": string | null,"customer_identifier": string | null,"customer_name": string | null,"end_time": string | null,"erased_at": string | null,"escalated_to_human": boolean,"escalation_reason": string | null,"id": string,"last_activity_at": string,"order_id": string | null,"organization_id": string,"platform_data": NonNullable<Json>,"primary_intent": string | null,"priority_level": number,"resolution_status": string | null,"resolution_time_seconds": number | null,"satisfaction_rating": number | null,"sentiment_score": number | null,"start_time": string,"status": Database["public"]['Enums']["conversation_status"],"store_id": string,"summary": string | null,"tags": (string)[],"title": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "ai_context"?: NonNullable<Json>,"assigned_agent_id"?: string | null,"channel": Database["public"]['Enums']["conversation_channel"],"conversation_history"?: NonNullable<Json>,"conversation_key": string,"created_at"?: string,"customer_id"?: string | null,"customer_identifier"?: string | null,"customer_name"?: string | null,"end_time"?: string | null,"erased_at"?: string | null,"escalated_to_human"?: boolean,"escalation_reason"?: string | null,"id"?: string,"last_activity_at"?: string,"order_id"?: string | null,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"primary_intent"?: string | null,"priority_level"?: number,"resolution_status"?: string | null,"resolution_time_seconds"?: number | null,"satisfaction_rating"?: number | null,"sentiment_score"?: number | null,"start_time"?: string,"status"?: Database["public"]['Enums']["conversation_status"],"store_id": string,"summary"?: string | null,"tags"?: (string)[],"title"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "ai_context"?: NonNullable<Json>,"assigned_agent_id"?: string | null,"channel"?: Database["public"]['Enums']["conversation_channel"],"conversation_history"?: NonNullable<Json>,"conversation_key"?: string,"created_at"?: string,"customer_id"?: string | null,"customer_identifier"?: string | null,"customer_name"?: string | null,"end_time"?: string | null,"erased_at"?: string | null,"escalated_to_human"?: boolean,"escalation_reason"?: string | null,"id"?: string,"last_activity_at"?: string,"order_id"?: string | null,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"primary_intent"?: string | null,"priority_level"?: number,"resolution_status"?: string | null,"resolution_time_seconds"?: number | null,"satisfaction_rating"?: number | null,"sentiment_score"?: number | null,"start_time"?: string,"status"?: Database["public"]['Enums']["conversation_status"],"store_id"?: string,"summary"?: string | null,"tags"?: (string)[],"title"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "conversations_organization_id_assigned_agent_id_fkey"
      columns: ["organization_id","assigned_agent_id"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "conversations_organization_id_store_id_customer_id_fkey"
      columns: ["organization_id","store_id","customer_id"]
isOneToOne: false
      referencedRelation: "customers"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "conversations_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "conversations_organization_id_store_id_order_id_fkey"
      columns: ["organization_id","store_id","order_id"]
isOneToOne: false
      referencedRelation: "orders"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"credit_accounts": {
                  Row: {
                    "balance_minor": number,"created_at": string,"currency": string,"expires_at": string | null,"id": string,"kind": Database["public"]['Enums']["credit_account_kind"],"organization_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "balance_minor"?: number,"created_at"?: string,"currency": string,"expires_at"?: string | null,"id"?: string,"kind": Database["public"]['Enums']["credit_account_kind"],"organization_id": string
                  }
                  Update: {
                    "balance_minor"?: number,"created_at"?: string,"currency"?: string,"expires_at"?: string | null,"id"?: string,"kind"?: Database["public"]['Enums']["credit_account_kind"],"organization_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_accounts_wallet_fkey"
      columns: ["organization_id","currency"]
isOneToOne: false
      referencedRelation: "call_credits"
      referencedColumns: ["organization_id","currency"]
    }
                  ]
                },"credit_ledger": {
                  Row: {
                    "account_id": string,"amount_minor": number,"id": string,"organization_id": string,"position": number,"side": Database["public"]['Enums']["ledger_side"],"transaction_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "account_id": string,"amount_minor": number,"id"?: string,"organization_id": string,"position": number,"side": Database["public"]['Enums']["ledger_side"],"transaction_id": string
                  }
                  Update: {
                    "account_id"?: string,"amount_minor"?: number,"id"?: string,"organization_id"?: string,"position"?: number,"side"?: Database["public"]['Enums']["ledger_side"],"transaction_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_ledger_account_fkey"
      columns: ["organization_id","account_id"]
isOneToOne: false
      referencedRelation: "credit_accounts"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "credit_ledger_transaction_fkey"
      columns: ["organization_id","transaction_id"]
isOneToOne: false
      referencedRelation: "credit_transactions"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"credit_note_lines": {
                  Row: {
                    "amount_minor": number,"credit_note_id": string,"description": string,"id": string,"invoice_line_id": string,"organization_id": string,"position": number
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"credit_note_id": string,"description": string,"id"?: string,"invoice_line_id": string,"organization_id": string,"position": number
                  }
                  Update: {
                    "amount_minor"?: number,"credit_note_id"?: string,"description"?: string,"id"?: string,"invoice_line_id"?: string,"organization_id"?: string,"position"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_note_lines_credit_note_fkey"
      columns: ["organization_id","credit_note_id"]
isOneToOne: false
      referencedRelation: "credit_notes"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "credit_note_lines_invoice_line_fkey"
      columns: ["organization_id","invoice_line_id"]
isOneToOne: false
      referencedRelation: "invoice_lines"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"credit_note_taxes": {
                  Row: {
                    "amount_minor": number,"credit_note_id": string,"id": string,"name": string,"organization_id": string,"position": number,"rate_bp": number,"taxable_minor": number
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"credit_note_id": string,"id"?: string,"name": string,"organization_id": string,"position": number,"rate_bp": number,"taxable_minor": number
                  }
                  Update: {
                    "amount_minor"?: number,"credit_note_id"?: string,"id"?: string,"name"?: string,"organization_id"?: string,"position"?: number,"rate_bp"?: number,"taxable_minor"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_note_taxes_credit_note_fkey"
      columns: ["organization_id","credit_note_id"]
isOneToOne: false
      referencedRelation: "credit_notes"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"credit_notes": {
                  Row: {
                    "ack_no": string | null,"created_at": string,"created_by": string | null,"credit_note_date": string | null,"credit_note_number": string | null,"currency": string,"customer": NonNullable<Json>,"id": string,"idempotency_key": string,"invoice_id": string,"irn": string | null,"issued_at": string | null,"issuer": NonNullable<Json>,"organization_id": string,"reason": string,"signed_qr": string | null,"status": Database["public"]['Enums']["credit_note_status"],"subtotal_minor": number,"tax_minor": number,"total_minor": number
                  }
                  ComputedFields: never
                  Insert: {
                    "ack_no"?: string | null,"created_at"?: string,"created_by"?: string | null,"credit_note_date"?: string | null,"credit_note_number"?: string | null,"currency": string,"customer": NonNullable<Json>,"id"?: string,"idempotency_key": string,"invoice_id": string,"irn"?: string | null,"issued_at"?: string | null,"issuer": NonNullable<Json>,"organization_id": string,"reason": string,"signed_qr"?: string | null,"status"?: Database["public"]['Enums']["credit_note_status"],"subtotal_minor": number,"tax_minor": number,"total_minor": number
                  }
                  Update: {
                    "ack_no"?: string | null,"created_at"?: string,"created_by"?: string | null,"credit_note_date"?: string | null,"credit_note_number"?: string | null,"currency"?: string,"customer"?: NonNullable<Json>,"id"?: string,"idempotency_key"?: string,"invoice_id"?: string,"irn"?: string | null,"issued_at"?: string | null,"issuer"?: NonNullable<Json>,"organization_id"?: string,"reason"?: string,"signed_qr"?: string | null,"status"?: Database["public"]['Enums']["credit_note_status"],"subtotal_minor"?: number,"tax_minor"?: number,"total_minor"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_notes_invoice_fkey"
      columns: ["organization_id","invoice_id"]
isOneToOne: false
      referencedRelation: "invoices"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "credit_notes_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"credit_transactions": {
                  Row: {
                    "amount_minor": number,"balance_after_minor": number,"balance_before_minor": number,"created_at": string,"created_by": string | null,"currency": string,"description": string | null,"id": string,"idempotency_key": string,"number": number,"organization_id": string,"reference_id": string | null,"reference_type": string | null,"requested_minor": number,"reverses_id": string | null,"type": Database["public"]['Enums']["credit_transaction_type"]
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"balance_after_minor": number,"balance_before_minor": number,"created_at": string,"created_by"?: string | null,"currency": string,"description"?: string | null,"id"?: string,"idempotency_key": string,"number": number,"organization_id": string,"reference_id"?: string | null,"reference_type"?: string | null,"requested_minor": number,"reverses_id"?: string | null,"type": Database["public"]['Enums']["credit_transaction_type"]
                  }
                  Update: {
                    "amount_minor"?: number,"balance_after_minor"?: number,"balance_before_minor"?: number,"created_at"?: string,"created_by"?: string | null,"currency"?: string,"description"?: string | null,"id"?: string,"idempotency_key"?: string,"number"?: number,"organization_id"?: string,"reference_id"?: string | null,"reference_type"?: string | null,"requested_minor"?: number,"reverses_id"?: string | null,"type"?: Database["public"]['Enums']["credit_transaction_type"]
                  }
                  Relationships: [
                    {
      foreignKeyName: "credit_transactions_reverses_fkey"
      columns: ["organization_id","reverses_id"]
isOneToOne: false
      referencedRelation: "credit_transactions"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "credit_transactions_wallet_fkey"
      columns: ["organization_id","currency"]
isOneToOne: false
      referencedRelation: "call_credits"
      referencedColumns: ["organization_id","currency"]
    }
                  ]
                },"customer_totals": {
                  Row: {
                    "created_at": string,"currency_code": string,"customer_id": string,"lifetime_value_minor": number,"organization_id": string,"store_id": string,"total_orders": number,"total_spent_minor": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"currency_code": string,"customer_id": string,"lifetime_value_minor": number,"organization_id": string,"store_id": string,"total_orders": number,"total_spent_minor": number,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"currency_code"?: string,"customer_id"?: string,"lifetime_value_minor"?: number,"organization_id"?: string,"store_id"?: string,"total_orders"?: number,"total_spent_minor"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "customer_totals_organization_id_store_id_customer_id_fkey"
      columns: ["organization_id","store_id","customer_id"]
isOneToOne: false
      referencedRelation: "customers"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"customers": {
                  Row: {
                    "accepts_marketing": boolean,"created_at": string,"email": string | null,"external_id": string,"first_name": string | null,"id": string,"last_contact_date": string | null,"last_name": string | null,"last_order_date": string | null,"last_synced_at": string,"organization_id": string,"phone": string | null,"platform_data": NonNullable<Json>,"preferred_language": string,"source_updated_at": string | null,"store_id": string,"sync_hash": string | null,"tags": (string)[],"total_orders": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "accepts_marketing"?: boolean,"created_at"?: string,"email"?: string | null,"external_id": string,"first_name"?: string | null,"id"?: string,"last_contact_date"?: string | null,"last_name"?: string | null,"last_order_date"?: string | null,"last_synced_at"?: string,"organization_id"?: string,"phone"?: string | null,"platform_data"?: NonNullable<Json>,"preferred_language"?: string,"source_updated_at"?: string | null,"store_id": string,"sync_hash"?: string | null,"tags"?: (string)[],"total_orders"?: number,"updated_at"?: string
                  }
                  Update: {
                    "accepts_marketing"?: boolean,"created_at"?: string,"email"?: string | null,"external_id"?: string,"first_name"?: string | null,"id"?: string,"last_contact_date"?: string | null,"last_name"?: string | null,"last_order_date"?: string | null,"last_synced_at"?: string,"organization_id"?: string,"phone"?: string | null,"platform_data"?: NonNullable<Json>,"preferred_language"?: string,"source_updated_at"?: string | null,"store_id"?: string,"sync_hash"?: string | null,"tags"?: (string)[],"total_orders"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "customers_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"event_deliveries": {
                  Row: {
                    "attempts": number,"created_at": string,"delivered_at": string | null,"duration_ms": number | null,"endpoint_id": string,"error": string | null,"event_id": string,"id": string,"last_attempt_at": string | null,"lease_token": string | null,"lease_until": string | null,"next_attempt_at": string | null,"organization_id": string,"response_body": string | null,"response_status": number | null,"status": string,"topic": string
                  }
                  ComputedFields: never
                  Insert: {
                    "attempts"?: number,"created_at"?: string,"delivered_at"?: string | null,"duration_ms"?: number | null,"endpoint_id": string,"error"?: string | null,"event_id": string,"id"?: string,"last_attempt_at"?: string | null,"lease_token"?: string | null,"lease_until"?: string | null,"next_attempt_at"?: string | null,"organization_id": string,"response_body"?: string | null,"response_status"?: number | null,"status"?: string,"topic": string
                  }
                  Update: {
                    "attempts"?: number,"created_at"?: string,"delivered_at"?: string | null,"duration_ms"?: number | null,"endpoint_id"?: string,"error"?: string | null,"event_id"?: string,"id"?: string,"last_attempt_at"?: string | null,"lease_token"?: string | null,"lease_until"?: string | null,"next_attempt_at"?: string | null,"organization_id"?: string,"response_body"?: string | null,"response_status"?: number | null,"status"?: string,"topic"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "event_deliveries_organization_id_endpoint_id_fkey"
      columns: ["organization_id","endpoint_id"]
isOneToOne: false
      referencedRelation: "webhook_endpoints"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "event_deliveries_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"impersonation_sessions": {
                  Row: {
                    "active": boolean | null,"admin_id": string,"created_at": string,"ended_at": string | null,"ended_by": string | null,"expires_at": string,"id": string,"is_read_only": boolean,"organization_id": string,"reason": string,"started_at": string,"target_user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "active"?: never,"admin_id": string,"created_at"?: string,"ended_at"?: string | null,"ended_by"?: string | null,"expires_at": string,"id"?: string,"is_read_only"?: boolean,"organization_id": string,"reason": string,"started_at"?: string,"target_user_id": string
                  }
                  Update: {
                    "active"?: never,"admin_id"?: string,"created_at"?: string,"ended_at"?: string | null,"ended_by"?: string | null,"expires_at"?: string,"id"?: string,"is_read_only"?: boolean,"organization_id"?: string,"reason"?: string,"started_at"?: string,"target_user_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "impersonation_sessions_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"invitations": {
                  Row: {
                    "accepted_at": string | null,"accepted_by": string | null,"created_at": string,"email": string,"expires_at": string,"id": string,"invited_by": string | null,"organization_id": string,"organization_name": string,"revoked_at": string | null,"role_id": string | null,"system_role": Database["public"]['Enums']["system_role"],"token_sha256": string
                  }
                  ComputedFields: never
                  Insert: {
                    "accepted_at"?: string | null,"accepted_by"?: string | null,"created_at"?: string,"email": string,"expires_at": string,"id"?: string,"invited_by"?: string | null,"organization_id": string,"organization_name": string,"revoked_at"?: string | null,"role_id"?: string | null,"system_role"?: Database["public"]['Enums']["system_role"],"token_sha256": string
                  }
                  Update: {
                    "accepted_at"?: string | null,"accepted_by"?: string | null,"created_at"?: string,"email"?: string,"expires_at"?: string,"id"?: string,"invited_by"?: string | null,"organization_id"?: string,"organization_name"?: string,"revoked_at"?: string | null,"role_id"?: string | null,"system_role"?: Database["public"]['Enums']["system_role"],"token_sha256"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "invitations_organization_id_accepted_by_fkey"
      columns: ["organization_id","accepted_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "invitations_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "invitations_organization_id_invited_by_fkey"
      columns: ["organization_id","invited_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "invitations_organization_id_role_id_fkey"
      columns: ["organization_id","role_id"]
isOneToOne: false
      referencedRelation: "roles"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"invoice_lines": {
                  Row: {
                    "amount_minor": number,"description": string,"discount_minor": number,"first_day": string | null,"id": string,"invoice_id": string,"kind": string,"last_day": string | null,"meter_key": string | null,"organization_id": string,"position": number,"price_units": number,"quantity": number,"unit": string,"unit_price_minor": number
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"description": string,"discount_minor"?: number,"first_day"?: string | null,"id"?: string,"invoice_id": string,"kind": string,"last_day"?: string | null,"meter_key"?: string | null,"organization_id": string,"position": number,"price_units"?: number,"quantity": number,"unit": string,"unit_price_minor": number
                  }
                  Update: {
                    "amount_minor"?: number,"description"?: string,"discount_minor"?: number,"first_day"?: string | null,"id"?: string,"invoice_id"?: string,"kind"?: string,"last_day"?: string | null,"meter_key"?: string | null,"organization_id"?: string,"position"?: number,"price_units"?: number,"quantity"?: number,"unit"?: string,"unit_price_minor"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "invoice_lines_invoice_fkey"
      columns: ["organization_id","invoice_id"]
isOneToOne: false
      referencedRelation: "invoices"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "invoice_lines_meter_key_fkey"
      columns: ["meter_key"]
isOneToOne: false
      referencedRelation: "meters"
      referencedColumns: ["key"]
    }
                  ]
                },"invoice_taxes": {
                  Row: {
                    "amount_minor": number,"id": string,"invoice_id": string,"name": string,"note": string | null,"organization_id": string,"position": number,"rate_bp": number,"taxable_minor": number,"treatment": string
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"id"?: string,"invoice_id": string,"name": string,"note"?: string | null,"organization_id": string,"position": number,"rate_bp": number,"taxable_minor": number,"treatment"?: string
                  }
                  Update: {
                    "amount_minor"?: number,"id"?: string,"invoice_id"?: string,"name"?: string,"note"?: string | null,"organization_id"?: string,"position"?: number,"rate_bp"?: number,"taxable_minor"?: number,"treatment"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "invoice_taxes_invoice_fkey"
      columns: ["organization_id","invoice_id"]
isOneToOne: false
      referencedRelation: "invoices"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"invoices": {
                  Row: {
                    "ack_no": string | null,"amount_paid_minor": number,"created_at": string,"credited_minor": number,"currency": string,"customer": NonNullable<Json>,"discount_minor": number,"discounts": NonNullable<Json>,"due_date": string | null,"finalized_at": string | null,"first_day": string,"id": string,"invoice_date": string | null,"invoice_number": string | null,"irn": string | null,"issuer": NonNullable<Json>,"kind": string,"last_day": string,"metadata": NonNullable<Json>,"organization_id": string,"paid_at": string | null,"past_due_at": string | null,"period_end": string,"period_start": string,"signed_qr": string | null,"status": Database["public"]['Enums']["invoice_status"],"subscription_id": string | null,"subtotal_minor": number,"tax_minor": number,"timezone": string,"total_minor": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "ack_no"?: string | null,"amount_paid_minor"?: number,"created_at"?: string,"credited_minor"?: number,"currency": string,"customer": NonNullable<Json>,"discount_minor"?: number,"discounts"?: NonNullable<Json>,"due_date"?: string | null,"finalized_at"?: string | null,"first_day": string,"id"?: string,"invoice_date"?: string | null,"invoice_number"?: string | null,"irn"?: string | null,"issuer": NonNullable<Json>,"kind"?: string,"last_day": string,"metadata"?: NonNullable<Json>,"organization_id": string,"paid_at"?: string | null,"past_due_at"?: string | null,"period_end": string,"period_start": string,"signed_qr"?: string | null,"status"?: Database["public"]['Enums']["invoice_status"],"subscription_id"?: string | null,"subtotal_minor": number,"tax_minor": number,"timezone": string,"total_minor": number,"updated_at"?: string
                  }
                  Update: {
                    "ack_no"?: string | null,"amount_paid_minor"?: number,"created_at"?: string,"credited_minor"?: number,"currency"?: string,"customer"?: NonNullable<Json>,"discount_minor"?: number,"discounts"?: NonNullable<Json>,"due_date"?: string | null,"finalized_at"?: string | null,"first_day"?: string,"id"?: string,"invoice_date"?: string | null,"invoice_number"?: string | null,"irn"?: string | null,"issuer"?: NonNullable<Json>,"kind"?: string,"last_day"?: string,"metadata"?: NonNullable<Json>,"organization_id"?: string,"paid_at"?: string | null,"past_due_at"?: string | null,"period_end"?: string,"period_start"?: string,"signed_qr"?: string | null,"status"?: Database["public"]['Enums']["invoice_status"],"subscription_id"?: string | null,"subtotal_minor"?: number,"tax_minor"?: number,"timezone"?: string,"total_minor"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "invoices_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "invoices_subscription_fkey"
      columns: ["organization_id","subscription_id"]
isOneToOne: false
      referencedRelation: "subscriptions"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"lead_activities": {
                  Row: {
                    "content": NonNullable<Json>,"created_at": string,"created_by": string | null,"id": string,"lead_id": string,"organization_id": string,"type": string
                  }
                  ComputedFields: never
                  Insert: {
                    "content"?: NonNullable<Json>,"created_at"?: string,"created_by"?: string | null,"id"?: string,"lead_id": string,"organization_id"?: string,"type": string
                  }
                  Update: {
                    "content"?: NonNullable<Json>,"created_at"?: string,"created_by"?: string | null,"id"?: string,"lead_id"?: string,"organization_id"?: string,"type"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "lead_activities_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "lead_activities_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "lead_activities_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"lead_forms": {
                  Row: {
                    "consent_scopes": (string)[],"consent_text": string | null,"created_at": string,"created_by": string | null,"description": string | null,"fields": NonNullable<Json>,"id": string,"is_active": boolean,"name": string,"organization_id": string,"project_id": string | null,"rate_per_minute": number,"stage_id": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "consent_scopes"?: (string)[],"consent_text"?: string | null,"created_at"?: string,"created_by"?: string | null,"description"?: string | null,"fields"?: NonNullable<Json>,"id"?: string,"is_active"?: boolean,"name": string,"organization_id"?: string,"project_id"?: string | null,"rate_per_minute"?: number,"stage_id"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "consent_scopes"?: (string)[],"consent_text"?: string | null,"created_at"?: string,"created_by"?: string | null,"description"?: string | null,"fields"?: NonNullable<Json>,"id"?: string,"is_active"?: boolean,"name"?: string,"organization_id"?: string,"project_id"?: string | null,"rate_per_minute"?: number,"stage_id"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "lead_forms_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "lead_forms_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "lead_forms_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "lead_forms_organization_id_stage_id_fkey"
      columns: ["organization_id","stage_id"]
isOneToOne: false
      referencedRelation: "pipeline_stages"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"leads": {
                  Row: {
                    "abuse_details": string | null,"abuse_flag": boolean,"archived_at": string | null,"assigned_to": string | null,"call_log_id": string | null,"call_status": Database["public"]['Enums']["call_outcome"] | null,"callback_time": string | null,"created_at": string,"created_by": string | null,"do_not_call": boolean,"email": string | null,"erased_at": string | null,"external_lead_id": string | null,"id": string,"last_contacted_at": string | null,"lead_source": string | null,"name": string,"notes": string | null,"opt_out_reason": string | null,"opted_out_at": string | null,"organization_id": string,"phone": string | null,"project_id": string | null,"raw_data": Json | null,"recording_consent": boolean,"rejection_reason": string | null,"score": number,"source": string,"stage_id": string | null,"status": string,"timezone": string | null,"updated_at": string,"waiting_status": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "abuse_details"?: string | null,"abuse_flag"?: boolean,"archived_at"?: string | null,"assigned_to"?: string | null,"call_log_id"?: string | null,"call_status"?: Database["public"]['Enums']["call_outcome"] | null,"callback_time"?: string | null,"created_at"?: string,"created_by"?: string | null,"do_not_call"?: boolean,"email"?: string | null,"erased_at"?: string | null,"external_lead_id"?: string | null,"id"?: string,"last_contacted_at"?: string | null,"lead_source"?: string | null,"name": string,"notes"?: string | null,"opt_out_reason"?: string | null,"opted_out_at"?: string | null,"organization_id"?: string,"phone"?: string | null,"project_id"?: string | null,"raw_data"?: Json | null,"recording_consent"?: boolean,"rejection_reason"?: string | null,"score"?: number,"source"?: string,"stage_id"?: string | null,"status"?: string,"timezone"?: string | null,"updated_at"?: string,"waiting_status"?: string | null
                  }
                  Update: {
                    "abuse_details"?: string | null,"abuse_flag"?: boolean,"archived_at"?: string | null,"assigned_to"?: string | null,"call_log_id"?: string | null,"call_status"?: Database["public"]['Enums']["call_outcome"] | null,"callback_time"?: string | null,"created_at"?: string,"created_by"?: string | null,"do_not_call"?: boolean,"email"?: string | null,"erased_at"?: string | null,"external_lead_id"?: string | null,"id"?: string,"last_contacted_at"?: string | null,"lead_source"?: string | null,"name"?: string,"notes"?: string | null,"opt_out_reason"?: string | null,"opted_out_at"?: string | null,"organization_id"?: string,"phone"?: string | null,"project_id"?: string | null,"raw_data"?: Json | null,"recording_consent"?: boolean,"rejection_reason"?: string | null,"score"?: number,"source"?: string,"stage_id"?: string | null,"status"?: string,"timezone"?: string | null,"updated_at"?: string,"waiting_status"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "leads_organization_id_assigned_to_fkey"
      columns: ["organization_id","assigned_to"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "leads_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "leads_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "leads_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "leads_organization_id_stage_id_fkey"
      columns: ["organization_id","stage_id"]
isOneToOne: false
      referencedRelation: "pipeline_stages"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"meters": {
                  Row: {
                    "aggregation": string,"created_at": string,"is_active": boolean,"is_reserved": boolean,"key": string,"name": string,"position": number,"pulse": number,"rounding": string,"source": string,"unit": string
                  }
                  ComputedFields: never
                  Insert: {
                    "aggregation"?: string,"created_at"?: string,"is_active"?: boolean,"is_reserved"?: boolean,"key": string,"name": string,"position"?: number,"pulse"?: number,"rounding"?: string,"source"?: string,"unit": string
                  }
                  Update: {
                    "aggregation"?: string,"created_at"?: string,"is_active"?: boolean,"is_reserved"?: boolean,"key"?: string,"name"?: string,"position"?: number,"pulse"?: number,"rounding"?: string,"source"?: string,"unit"?: string
                  }
                  Relationships: [
                    
                  ]
                },"order_line_items": {
                  Row: {
                    "created_at": string,"external_id": string | null,"external_product_id": string | null,"external_variant_id": string | null,"fulfilled_quantity": number,"fulfillment_status": Database["public"]['Enums']["fulfillment_status"],"id": string,"order_id": string,"organization_id": string,"price_minor": number,"product_id": string | null,"properties": NonNullable<Json>,"quantity": number,"sku": string | null,"store_id": string,"title": string,"total_price_minor": number,"updated_at": string,"variant_title": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"external_id"?: string | null,"external_product_id"?: string | null,"external_variant_id"?: string | null,"fulfilled_quantity"?: number,"fulfillment_status"?: Database["public"]['Enums']["fulfillment_status"],"id"?: string,"order_id": string,"organization_id"?: string,"price_minor": number,"product_id"?: string | null,"properties"?: NonNullable<Json>,"quantity": number,"sku"?: string | null,"store_id": string,"title": string,"total_price_minor": number,"updated_at"?: string,"variant_title"?: string | null
                  }
                  Update: {
                    "created_at"?: string,"external_id"?: string | null,"external_product_id"?: string | null,"external_variant_id"?: string | null,"fulfilled_quantity"?: number,"fulfillment_status"?: Database["public"]['Enums']["fulfillment_status"],"id"?: string,"order_id"?: string,"organization_id"?: string,"price_minor"?: number,"product_id"?: string | null,"properties"?: NonNullable<Json>,"quantity"?: number,"sku"?: string | null,"store_id"?: string,"title"?: string,"total_price_minor"?: number,"updated_at"?: string,"variant_title"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "order_line_items_organization_id_store_id_order_id_fkey"
      columns: ["organization_id","store_id","order_id"]
isOneToOne: false
      referencedRelation: "orders"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "order_line_items_organization_id_store_id_product_id_fkey"
      columns: ["organization_id","store_id","product_id"]
isOneToOne: false
      referencedRelation: "products"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"orders": {
                  Row: {
                    "billing_address": Json | null,"cancelled_date": string | null,"created_at": string,"currency_code": string,"customer_email": string | null,"customer_external_id": string | null,"customer_first_name": string | null,"customer_id": string | null,"customer_last_name": string | null,"customer_notes": string | null,"customer_phone": string | null,"delivered_date": string | null,"external_id": string,"fulfillment_status": Database["public"]['Enums']["fulfillment_status"],"id": string,"internal_notes": string | null,"is_standing": boolean,"last_synced_at": string,"order_date": string,"order_number": string | null,"organization_id": string,"payment_status": Database["public"]['Enums']["payment_status"],"platform_data": NonNullable<Json>,"shipped_date": string | null,"shipping_address": Json | null,"shipping_method": string | null,"source_updated_at": string | null,"status": Database["public"]['Enums']["order_status"],"store_id": string,"subtotal_price_minor": number,"sync_hash": string | null,"total_discounts_minor": number,"total_price_minor": number,"total_refunded_minor": number,"total_shipping_minor": number,"total_tax_minor": number,"tracking_number": string | null,"tracking_url": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "billing_address"?: Json | null,"cancelled_date"?: string | null,"created_at"?: string,"currency_code": string,"customer_email"?: string | null,"customer_external_id"?: string | null,"customer_first_name"?: string | null,"customer_id"?: string | null,"customer_last_name"?: string | null,"customer_notes"?: string | null,"customer_phone"?: string | null,"delivered_date"?: string | null,"external_id": string,"fulfillment_status"?: Database["public"]['Enums']["fulfillment_status"],"id"?: string,"internal_notes"?: string | null,"is_standing"?: never,"last_synced_at"?: string,"order_date": string,"order_number"?: string | null,"organization_id"?: string,"payment_status"?: Database["public"]['Enums']["payment_status"],"platform_data"?: NonNullable<Json>,"shipped_date"?: string | null,"shipping_address"?: Json | null,"shipping_method"?: string | null,"source_updated_at"?: string | null,"status"?: Database["public"]['Enums']["order_status"],"store_id": string,"subtotal_price_minor": number,"sync_hash"?: string | null,"total_discounts_minor"?: number,"total_price_minor": number,"total_refunded_minor"?: number,"total_shipping_minor"?: number,"total_tax_minor"?: number,"tracking_number"?: string | null,"tracking_url"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "billing_address"?: Json | null,"cancelled_date"?: string | null,"created_at"?: string,"currency_code"?: string,"customer_email"?: string | null,"customer_external_id"?: string | null,"customer_first_name"?: string | null,"customer_id"?: string | null,"customer_last_name"?: string | null,"customer_notes"?: string | null,"customer_phone"?: string | null,"delivered_date"?: string | null,"external_id"?: string,"fulfillment_status"?: Database["public"]['Enums']["fulfillment_status"],"id"?: string,"internal_notes"?: string | null,"is_standing"?: never,"last_synced_at"?: string,"order_date"?: string,"order_number"?: string | null,"organization_id"?: string,"payment_status"?: Database["public"]['Enums']["payment_status"],"platform_data"?: NonNullable<Json>,"shipped_date"?: string | null,"shipping_address"?: Json | null,"shipping_method"?: string | null,"source_updated_at"?: string | null,"status"?: Database["public"]['Enums']["order_status"],"store_id"?: string,"subtotal_price_minor"?: number,"sync_hash"?: string | null,"total_discounts_minor"?: number,"total_price_minor"?: number,"total_refunded_minor"?: number,"total_shipping_minor"?: number,"total_tax_minor"?: number,"tracking_number"?: string | null,"tracking_url"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "orders_organization_id_store_id_customer_id_fkey"
      columns: ["organization_id","store_id","customer_id"]
isOneToOne: false
      referencedRelation: "customers"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "orders_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"organizations": {
                  Row: {
                    "address_line_1": string | null,"address_line_2": string | null,"business_type": string | null,"caller_id": string | null,"city": string | null,"company_name": string | null,"contact_number": string | null,"country": string,"country_code": string,"created_at": string,"currency": string,"dial_countries": (string)[] | null,"dialling_enabled": boolean,"dispatch_weight": number,"gstin": string | null,"hourly_cost_currency": string,"id": string,"max_concurrent_calls": number,"max_hourly_cost_micros": number | null,"max_price_micros": number | null,"name": string,"onboarding_status": string,"pincode": string | null,"sector": string,"settings": NonNullable<Json>,"slug": string | null,"state": string | null,"state_code": string | null,"tax_id": string | null,"tier": Database["public"]['Enums']["org_tier"],"timezone": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "address_line_1"?: string | null,"address_line_2"?: string | null,"business_type"?: string | null,"caller_id"?: string | null,"city"?: string | null,"company_name"?: string | null,"contact_number"?: string | null,"country"?: string,"country_code"?: string,"created_at"?: string,"currency"?: string,"dial_countries"?: (string)[] | null,"dialling_enabled"?: boolean,"dispatch_weight"?: number,"gstin"?: string | null,"hourly_cost_currency"?: string,"id"?: string,"max_concurrent_calls"?: number,"max_hourly_cost_micros"?: number | null,"max_price_micros"?: number | null,"name": string,"onboarding_status"?: string,"pincode"?: string | null,"sector"?: string,"settings"?: NonNullable<Json>,"slug"?: string | null,"state"?: string | null,"state_code"?: string | null,"tax_id"?: string | null,"tier"?: Database["public"]['Enums']["org_tier"],"timezone"?: string,"updated_at"?: string
                  }
                  Update: {
                    "address_line_1"?: string | null,"address_line_2"?: string | null,"business_type"?: string | null,"caller_id"?: string | null,"city"?: string | null,"company_name"?: string | null,"contact_number"?: string | null,"country"?: string,"country_code"?: string,"created_at"?: string,"currency"?: string,"dial_countries"?: (string)[] | null,"dialling_enabled"?: boolean,"dispatch_weight"?: number,"gstin"?: string | null,"hourly_cost_currency"?: string,"id"?: string,"max_concurrent_calls"?: number,"max_hourly_cost_micros"?: number | null,"max_price_micros"?: number | null,"name"?: string,"onboarding_status"?: string,"pincode"?: string | null,"sector"?: string,"settings"?: NonNullable<Json>,"slug"?: string | null,"state"?: string | null,"state_code"?: string | null,"tax_id"?: string | null,"tier"?: Database["public"]['Enums']["org_tier"],"timezone"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    
                  ]
                },"payment_methods": {
                  Row: {
                    "brand": string | null,"created_at": string,"expiry_month": number | null,"expiry_year": number | null,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_customer_id": string | null,"gateway_payment_method_id": string,"id": string,"is_default": boolean,"last4": string | null,"metadata": NonNullable<Json>,"organization_id": string,"removed_at": string | null,"type": Database["public"]['Enums']["payment_method_type"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "brand"?: string | null,"created_at"?: string,"expiry_month"?: number | null,"expiry_year"?: number | null,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_customer_id"?: string | null,"gateway_payment_method_id": string,"id"?: string,"is_default"?: boolean,"last4"?: string | null,"metadata"?: NonNullable<Json>,"organization_id": string,"removed_at"?: string | null,"type": Database["public"]['Enums']["payment_method_type"],"updated_at"?: string
                  }
                  Update: {
                    "brand"?: string | null,"created_at"?: string,"expiry_month"?: number | null,"expiry_year"?: number | null,"gateway"?: Database["public"]['Enums']["payment_gateway"],"gateway_customer_id"?: string | null,"gateway_payment_method_id"?: string,"id"?: string,"is_default"?: boolean,"last4"?: string | null,"metadata"?: NonNullable<Json>,"organization_id"?: string,"removed_at"?: string | null,"type"?: Database["public"]['Enums']["payment_method_type"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "payment_methods_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"payments": {
                  Row: {
                    "amount_minor": number,"applied_minor": number,"captured_at": string | null,"created_at": string,"currency": string,"dispute_status": string | null,"disputed_at": string | null,"disputed_minor": number | null,"failure_code": string | null,"failure_message": string | null,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_order_id": string | null,"gateway_payment_id": string | null,"id": string,"invoice_id": string | null,"organization_id": string,"payment_method_id": string | null,"problem": string | null,"purpose": string,"refunded_minor": number,"status": Database["public"]['Enums']["payment_transaction_status"],"status_at": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"applied_minor"?: number,"captured_at"?: string | null,"created_at"?: string,"currency": string,"dispute_status"?: string | null,"disputed_at"?: string | null,"disputed_minor"?: number | null,"failure_code"?: string | null,"failure_message"?: string | null,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_order_id"?: string | null,"gateway_payment_id"?: string | null,"id"?: string,"invoice_id"?: string | null,"organization_id": string,"payment_method_id"?: string | null,"problem"?: string | null,"purpose": string,"refunded_minor"?: number,"status"?: Database["public"]['Enums']["payment_transaction_status"],"status_at": string,"updated_at"?: string
                  }
                  Update: {
                    "amount_minor"?: number,"applied_minor"?: number,"captured_at"?: string | null,"created_at"?: string,"currency"?: string,"dispute_status"?: string | null,"disputed_at"?: string | null,"disputed_minor"?: number | null,"failure_code"?: string | null,"failure_message"?: string | null,"gateway"?: Database["public"]['Enums']["payment_gateway"],"gateway_order_id"?: string | null,"gateway_payment_id"?: string | null,"id"?: string,"invoice_id"?: string | null,"organization_id"?: string,"payment_method_id"?: string | null,"problem"?: string | null,"purpose"?: string,"refunded_minor"?: number,"status"?: Database["public"]['Enums']["payment_transaction_status"],"status_at"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "payments_invoice_fkey"
      columns: ["organization_id","invoice_id"]
isOneToOne: false
      referencedRelation: "invoices"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "payments_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "payments_payment_method_fkey"
      columns: ["organization_id","payment_method_id"]
isOneToOne: false
      referencedRelation: "payment_methods"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"permissions": {
                  Row: {
                    "admin": boolean,"description": string,"key": string,"member": boolean
                  }
                  ComputedFields: never
                  Insert: {
                    "admin": boolean,"description": string,"key": string,"member": boolean
                  }
                  Update: {
                    "admin"?: boolean,"description"?: string,"key"?: string,"member"?: boolean
                  }
                  Relationships: [
                    
                  ]
                },"pipeline_stages": {
                  Row: {
                    "color": string,"created_at": string,"id": string,"name": string,"order_index": number,"organization_id": string,"pipeline_id": string,"position": number | null,"project_id": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "color"?: string,"created_at"?: string,"id"?: string,"name": string,"order_index"?: number,"organization_id"?: string,"pipeline_id": string,"position"?: never,"project_id"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "color"?: string,"created_at"?: string,"id"?: string,"name"?: string,"order_index"?: number,"organization_id"?: string,"pipeline_id"?: string,"position"?: never,"project_id"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "pipeline_stages_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "pipeline_stages_organization_id_pipeline_id_fkey"
      columns: ["organization_id","pipeline_id"]
isOneToOne: false
      referencedRelation: "pipelines"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "pipeline_stages_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"pipelines": {
                  Row: {
                    "created_at": string,"id": string,"is_default": boolean,"name": string,"organization_id": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"is_default"?: boolean,"name": string,"organization_id"?: string,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"is_default"?: boolean,"name"?: string,"organization_id"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "pipelines_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"plan_price_meters": {
                  Row: {
                    "credit_price_minor": number | null,"credit_pulse": number,"credit_unit": number,"hard": boolean,"included_units": number | null,"limit_units": number | null,"meter_key": string,"overage_price_minor": number | null,"overage_unit": number,"plan_price_id": string,"pricing_model": string,"rate_deck": string | null,"tiers": Json | null
                  }
                  ComputedFields: never
                  Insert: {
                    "credit_price_minor"?: number | null,"credit_pulse"?: number,"credit_unit"?: number,"hard"?: boolean,"included_units"?: number | null,"limit_units"?: number | null,"meter_key": string,"overage_price_minor"?: number | null,"overage_unit"?: number,"plan_price_id": string,"pricing_model"?: string,"rate_deck"?: string | null,"tiers"?: Json | null
                  }
                  Update: {
                    "credit_price_minor"?: number | null,"credit_pulse"?: number,"credit_unit"?: number,"hard"?: boolean,"included_units"?: number | null,"limit_units"?: number | null,"meter_key"?: string,"overage_price_minor"?: number | null,"overage_unit"?: number,"plan_price_id"?: string,"pricing_model"?: string,"rate_deck"?: string | null,"tiers"?: Json | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "plan_price_meters_meter_key_fkey"
      columns: ["meter_key"]
isOneToOne: false
      referencedRelation: "meters"
      referencedColumns: ["key"]
    },{
      foreignKeyName: "plan_price_meters_plan_price_id_fkey"
      columns: ["plan_price_id"]
isOneToOne: false
      referencedRelation: "plan_prices"
      referencedColumns: ["id"]
    }
                  ]
                },"plan_prices": {
                  Row: {
                    "base_minor": number,"billed_in": string,"billing_cycle": Database["public"]['Enums']["billing_cycle"],"created_at": string,"currency": string,"id": string,"minimum_minor": number | null,"monthly_credit_minor": number,"plan_id": string,"retired_at": string | null,"version": number
                  }
                  ComputedFields: never
                  Insert: {
                    "base_minor"?: number,"billed_in"?: string,"billing_cycle"?: Database["public"]['Enums']["billing_cycle"],"created_at"?: string,"currency"?: string,"id"?: string,"minimum_minor"?: number | null,"monthly_credit_minor"?: number,"plan_id": string,"retired_at"?: string | null,"version": number
                  }
                  Update: {
                    "base_minor"?: number,"billed_in"?: string,"billing_cycle"?: Database["public"]['Enums']["billing_cycle"],"created_at"?: string,"currency"?: string,"id"?: string,"minimum_minor"?: number | null,"monthly_credit_minor"?: number,"plan_id"?: string,"retired_at"?: string | null,"version"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "plan_prices_plan_id_fkey"
      columns: ["plan_id"]
isOneToOne: false
      referencedRelation: "subscription_plans"
      referencedColumns: ["id"]
    }
                  ]
                },"platform_audit_logs": {
                  Row: {
                    "action": string,"created_at": string,"entity_id": string | null,"entity_type": string | null,"id": string,"metadata": NonNullable<Json>,"user_id": string | null,"user_name": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "action": string,"created_at"?: string,"entity_id"?: string | null,"entity_type"?: string | null,"id"?: string,"metadata"?: NonNullable<Json>,"user_id"?: string | null,"user_name"?: string | null
                  }
                  Update: {
                    "action"?: string,"created_at"?: string,"entity_id"?: string | null,"entity_type"?: string | null,"id"?: string,"metadata"?: NonNullable<Json>,"user_id"?: string | null,"user_name"?: string | null
                  }
                  Relationships: [
                    
                  ]
                },"privacy_requests": {
                  Row: {
                    "completed_at": string | null,"created_at": string,"customer_external_id": string | null,"customer_id": string | null,"due_at": string,"external_id": string | null,"id": string,"kind": string,"order_external_ids": (string)[],"organization_id": string,"requested_at": string,"store_id": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "completed_at"?: string | null,"created_at"?: string,"customer_external_id"?: string | null,"customer_id"?: string | null,"due_at": string,"external_id"?: string | null,"id"?: string,"kind": string,"order_external_ids"?: (string)[],"organization_id": string,"requested_at": string,"store_id": string,"updated_at"?: string
                  }
                  Update: {
                    "completed_at"?: string | null,"created_at"?: string,"customer_external_id"?: string | null,"customer_id"?: string | null,"due_at"?: string,"external_id"?: string | null,"id"?: string,"kind"?: string,"order_external_ids"?: (string)[],"organization_id"?: string,"requested_at"?: string,"store_id"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "privacy_requests_organization_id_store_id_customer_id_fkey"
      columns: ["organization_id","store_id","customer_id"]
isOneToOne: false
      referencedRelation: "customers"
      referencedColumns: ["organization_id","store_id","id"]
    },{
      foreignKeyName: "privacy_requests_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"product_images": {
                  Row: {
                    "alt_text": string | null,"created_at": string,"external_id": string | null,"id": string,"organization_id": string,"position": number,"product_id": string,"store_id": string,"updated_at": string,"url": string
                  }
                  ComputedFields: never
                  Insert: {
                    "alt_text"?: string | null,"created_at"?: string,"external_id"?: string | null,"id"?: string,"organization_id"?: string,"position"?: number,"product_id": string,"store_id": string,"updated_at"?: string,"url": string
                  }
                  Update: {
                    "alt_text"?: string | null,"created_at"?: string,"external_id"?: string | null,"id"?: string,"organization_id"?: string,"position"?: number,"product_id"?: string,"store_id"?: string,"updated_at"?: string,"url"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "product_images_organization_id_store_id_product_id_fkey"
      columns: ["organization_id","store_id","product_id"]
isOneToOne: false
      referencedRelation: "products"
      referencedColumns: ["organization_id","store_id","id"]
    }
                  ]
                },"products": {
                  Row: {
                    "availability": Database["public"]['Enums']["product_availability"],"barcode": string | null,"compare_at_price_minor": number | null,"cost_per_item_minor": number | null,"created_at": string,"currency_code": string,"description": string | null,"external_id": string,"external_variant_id": string | null,"handle": string | null,"id": string,"inventory_quantity": number,"inventory_tracked": boolean,"is_published": boolean,"last_synced_at": string,"organization_id": string,"platform_data": NonNullable<Json>,"price_minor": number,"product_type": string | null,"published_at": string | null,"seo_description": string | null,"seo_title": string | null,"sku": string | null,"source_updated_at": string | null,"status": Database["public"]['Enums']["product_status"],"store_id": string,"sync_hash": string | null,"tags": (string)[],"title": string,"updated_at": string,"vendor": string | null,"weight": number | null,"weight_unit": string
                  }
                  ComputedFields: never
                  Insert: {
                    "availability"?: Database["public"]['Enums']["product_availability"],"barcode"?: string | null,"compare_at_price_minor"?: number | null,"cost_per_item_minor"?: number | null,"created_at"?: string,"currency_code": string,"description"?: string | null,"external_id": string,"external_variant_id"?: string | null,"handle"?: string | null,"id"?: string,"inventory_quantity"?: number,"inventory_tracked"?: boolean,"is_published"?: boolean,"last_synced_at"?: string,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"price_minor": number,"product_type"?: string | null,"published_at"?: string | null,"seo_description"?: string | null,"seo_title"?: string | null,"sku"?: string | null,"source_updated_at"?: string | null,"status"?: Database["public"]['Enums']["product_status"],"store_id": string,"sync_hash"?: string | null,"tags"?: (string)[],"title": string,"updated_at"?: string,"vendor"?: string | null,"weight"?: number | null,"weight_unit"?: string
                  }
                  Update: {
                    "availability"?: Database["public"]['Enums']["product_availability"],"barcode"?: string | null,"compare_at_price_minor"?: number | null,"cost_per_item_minor"?: number | null,"created_at"?: string,"currency_code"?: string,"description"?: string | null,"external_id"?: string,"external_variant_id"?: string | null,"handle"?: string | null,"id"?: string,"inventory_quantity"?: number,"inventory_tracked"?: boolean,"is_published"?: boolean,"last_synced_at"?: string,"organization_id"?: string,"platform_data"?: NonNullable<Json>,"price_minor"?: number,"product_type"?: string | null,"published_at"?: string | null,"seo_description"?: string | null,"seo_title"?: string | null,"sku"?: string | null,"source_updated_at"?: string | null,"status"?: Database["public"]['Enums']["product_status"],"store_id"?: string,"sync_hash"?: string | null,"tags"?: (string)[],"title"?: string,"updated_at"?: string,"vendor"?: string | null,"weight"?: number | null,"weight_unit"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "products_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"profiles": {
                  Row: {
                    "acting_for": string | null,"acting_read_only": boolean,"acting_session_id": string | null,"acting_until": string | null,"avatar_url": string | null,"created_at": string,"email": string | null,"full_name": string | null,"id": string,"metadata": NonNullable<Json>,"organization_id": string | null,"phone": string | null,"role_id": string | null,"status": Database["public"]['Enums']["user_status"],"system_role": Database["public"]['Enums']["system_role"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "acting_for"?: string | null,"acting_read_only"?: boolean,"acting_session_id"?: string | null,"acting_until"?: string | null,"avatar_url"?: string | null,"created_at"?: string,"email"?: string | null,"full_name"?: string | null,"id": string,"metadata"?: NonNullable<Json>,"organization_id"?: string | null,"phone"?: string | null,"role_id"?: string | null,"status"?: Database["public"]['Enums']["user_status"],"system_role"?: Database["public"]['Enums']["system_role"],"updated_at"?: string
                  }
                  Update: {
                    "acting_for"?: string | null,"acting_read_only"?: boolean,"acting_session_id"?: string | null,"acting_until"?: string | null,"avatar_url"?: string | null,"created_at"?: string,"email"?: string | null,"full_name"?: string | null,"id"?: string,"metadata"?: NonNullable<Json>,"organization_id"?: string | null,"phone"?: string | null,"role_id"?: string | null,"status"?: Database["public"]['Enums']["user_status"],"system_role"?: Database["public"]['Enums']["system_role"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "profiles_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "profiles_organization_id_role_id_fkey"
      columns: ["organization_id","role_id"]
isOneToOne: false
      referencedRelation: "roles"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"projects": {
                  Row: {
                    "address": string | null,"created_at": string,"created_by": string | null,"description": string | null,"id": string,"image_path": string | null,"image_url": string | null,"metadata": NonNullable<Json>,"name": string,"organization_id": string,"project_type": string | null,"status": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "address"?: string | null,"created_at"?: string,"created_by"?: string | null,"description"?: string | null,"id"?: string,"image_path"?: string | null,"image_url"?: string | null,"metadata"?: NonNullable<Json>,"name": string,"organization_id"?: string,"project_type"?: string | null,"status"?: string,"updated_at"?: string
                  }
                  Update: {
                    "address"?: string | null,"created_at"?: string,"created_by"?: string | null,"description"?: string | null,"id"?: string,"image_path"?: string | null,"image_url"?: string | null,"metadata"?: NonNullable<Json>,"name"?: string,"organization_id"?: string,"project_type"?: string | null,"status"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "projects_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "projects_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"properties": {
                  Row: {
                    "address": string | null,"archived_at": string | null,"bathrooms": number | null,"bedrooms": number | null,"created_at": string,"created_by": string | null,"currency_code": string,"description": string | null,"floor_number": number | null,"id": string,"organization_id": string,"price_minor": number,"project_id": string | null,"size_sqft": number | null,"status": string,"title": string,"tower": string | null,"type": string,"unit_number": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "address"?: string | null,"archived_at"?: string | null,"bathrooms"?: number | null,"bedrooms"?: number | null,"created_at"?: string,"created_by"?: string | null,"currency_code": string,"description"?: string | null,"floor_number"?: number | null,"id"?: string,"organization_id"?: string,"price_minor": number,"project_id"?: string | null,"size_sqft"?: number | null,"status"?: string,"title": string,"tower"?: string | null,"type": string,"unit_number"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "address"?: string | null,"archived_at"?: string | null,"bathrooms"?: number | null,"bedrooms"?: number | null,"created_at"?: string,"created_by"?: string | null,"currency_code"?: string,"description"?: string | null,"floor_number"?: number | null,"id"?: string,"organization_id"?: string,"price_minor"?: number,"project_id"?: string | null,"size_sqft"?: number | null,"status"?: string,"title"?: string,"tower"?: string | null,"type"?: string,"unit_number"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "properties_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "properties_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "properties_organization_id_project_id_fkey"
      columns: ["organization_id","project_id"]
isOneToOne: false
      referencedRelation: "projects"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"property_features": {
                  Row: {
                    "created_at": string,"feature_name": string,"id": string,"organization_id": string,"property_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"feature_name": string,"id"?: string,"organization_id"?: string,"property_id": string
                  }
                  Update: {
                    "created_at"?: string,"feature_name"?: string,"id"?: string,"organization_id"?: string,"property_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "property_features_organization_id_property_id_fkey"
      columns: ["organization_id","property_id"]
isOneToOne: false
      referencedRelation: "properties"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"property_images": {
                  Row: {
                    "created_at": string,"id": string,"is_featured": boolean,"order_index": number,"organization_id": string,"position": number | null,"property_id": string,"updated_at": string,"url": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"is_featured"?: boolean,"order_index"?: number,"organization_id"?: string,"position"?: never,"property_id": string,"updated_at"?: string,"url": string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"is_featured"?: boolean,"order_index"?: number,"organization_id"?: string,"position"?: never,"property_id"?: string,"updated_at"?: string,"url"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "property_images_organization_id_property_id_fkey"
      columns: ["organization_id","property_id"]
isOneToOne: false
      referencedRelation: "properties"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"property_reservations": {
                  Row: {
                    "created_at": string,"ended_at": string | null,"held_until": string | null,"id": string,"lead_id": string | null,"organization_id": string,"property_id": string,"reserved_by": string | null,"status": string,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"ended_at"?: string | null,"held_until"?: string | null,"id"?: string,"lead_id"?: string | null,"organization_id": string,"property_id": string,"reserved_by"?: string | null,"status"?: string,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"ended_at"?: string | null,"held_until"?: string | null,"id"?: string,"lead_id"?: string | null,"organization_id"?: string,"property_id"?: string,"reserved_by"?: string | null,"status"?: string,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "property_reservations_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "property_reservations_organization_id_property_id_fkey"
      columns: ["organization_id","property_id"]
isOneToOne: false
      referencedRelation: "properties"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "property_reservations_organization_id_reserved_by_fkey"
      columns: ["organization_id","reserved_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"refunds": {
                  Row: {
                    "amount_minor": number,"created_at": string,"currency": string,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_refund_id": string,"id": string,"organization_id": string,"payment_id": string,"processed_at": string | null,"status": Database["public"]['Enums']["refund_status"],"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "amount_minor": number,"created_at"?: string,"currency": string,"gateway": Database["public"]['Enums']["payment_gateway"],"gateway_refund_id": string,"id"?: string,"organization_id": string,"payment_id": string,"processed_at"?: string | null,"status": Database["public"]['Enums']["refund_status"],"updated_at"?: string
                  }
                  Update: {
                    "amount_minor"?: number,"created_at"?: string,"currency"?: string,"gateway"?: Database["public"]['Enums']["payment_gateway"],"gateway_refund_id"?: string,"id"?: string,"organization_id"?: string,"payment_id"?: string,"processed_at"?: string | null,"status"?: Database["public"]['Enums']["refund_status"],"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "refunds_payment_fkey"
      columns: ["organization_id","payment_id"]
isOneToOne: false
      referencedRelation: "payments"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"roles": {
                  Row: {
                    "created_at": string,"description": string | null,"id": string,"is_system_default": boolean,"name": string,"organization_id": string,"permissions": NonNullable<Json>,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"description"?: string | null,"id"?: string,"is_system_default"?: boolean,"name": string,"organization_id"?: string,"permissions"?: NonNullable<Json>,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"description"?: string | null,"id"?: string,"is_system_default"?: boolean,"name"?: string,"organization_id"?: string,"permissions"?: NonNullable<Json>,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "roles_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"settings": {
                  Row: {
                    "category": Database["public"]['Enums']["setting_category"],"created_at": string,"description": string | null,"id": string,"is_encrypted": boolean,"is_required": boolean,"key": string,"organization_id": string,"store_id": string | null,"updated_at": string,"value": NonNullable<Json>
                  }
                  ComputedFields: never
                  Insert: {
                    "category": Database["public"]['Enums']["setting_category"],"created_at"?: string,"description"?: string | null,"id"?: string,"is_encrypted"?: boolean,"is_required"?: boolean,"key": string,"organization_id"?: string,"store_id"?: string | null,"updated_at"?: string,"value": NonNullable<Json>
                  }
                  Update: {
                    "category"?: Database["public"]['Enums']["setting_category"],"created_at"?: string,"description"?: string | null,"id"?: string,"is_encrypted"?: boolean,"is_required"?: boolean,"key"?: string,"organization_id"?: string,"store_id"?: string | null,"updated_at"?: string,"value"?: NonNullable<Json>
                  }
                  Relationships: [
                    {
      foreignKeyName: "settings_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "settings_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"stage_transitions": {
                  Row: {
                    "from_stage_id": string | null,"from_stage_name": string | null,"id": string,"lead_id": string,"moved_at": string,"moved_by": string | null,"organization_id": string,"to_stage_id": string | null,"to_stage_name": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "from_stage_id"?: string | null,"from_stage_name"?: string | null,"id"?: string,"lead_id": string,"moved_at"?: string,"moved_by"?: string | null,"organization_id": string,"to_stage_id"?: string | null,"to_stage_name"?: string | null
                  }
                  Update: {
                    "from_stage_id"?: string | null,"from_stage_name"?: string | null,"id"?: string,"lead_id"?: string,"moved_at"?: string,"moved_by"?: string | null,"organization_id"?: string,"to_stage_id"?: string | null,"to_stage_name"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "stage_transitions_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "stage_transitions_organization_id_from_stage_id_fkey"
      columns: ["organization_id","from_stage_id"]
isOneToOne: false
      referencedRelation: "pipeline_stages"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "stage_transitions_organization_id_lead_id_fkey"
      columns: ["organization_id","lead_id"]
isOneToOne: false
      referencedRelation: "leads"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "stage_transitions_organization_id_moved_by_fkey"
      columns: ["organization_id","moved_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "stage_transitions_organization_id_to_stage_id_fkey"
      columns: ["organization_id","to_stage_id"]
isOneToOne: false
      referencedRelation: "pipeline_stages"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"store_phone_numbers": {
                  Row: {
                    "carrier_account_id": string | null,"created_at": string,"id": string,"is_active": boolean,"is_primary": boolean,"organization_id": string,"phone_number": string,"store_id": string,"twilio_sid": string | null,"updated_at": string,"voice_method": string,"voice_url": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "carrier_account_id"?: string | null,"created_at"?: string,"id"?: string,"is_active"?: boolean,"is_primary"?: boolean,"organization_id": string,"phone_number": string,"store_id": string,"twilio_sid"?: string | null,"updated_at"?: string,"voice_method"?: string,"voice_url"?: string | null
                  }
                  Update: {
                    "carrier_account_id"?: string | null,"created_at"?: string,"id"?: string,"is_active"?: boolean,"is_primary"?: boolean,"organization_id"?: string,"phone_number"?: string,"store_id"?: string,"twilio_sid"?: string | null,"updated_at"?: string,"voice_method"?: string,"voice_url"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "store_phone_numbers_carrier_account_id_fkey"
      columns: ["carrier_account_id"]
isOneToOne: false
      referencedRelation: "carrier_accounts"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "store_phone_numbers_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"stores": {
                  Row: {
                    "created_at": string,"currency_code": string,"domain": string,"id": string,"last_sync_at": string | null,"name": string,"organization_id": string,"owner_email": string | null,"owner_name": string | null,"platform": Database["public"]['Enums']["store_platform"],"status": Database["public"]['Enums']["store_status"],"store_url": string | null,"sync_enabled": boolean,"timezone": string,"token_expires_at": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"currency_code"?: string,"domain": string,"id"?: string,"last_sync_at"?: string | null,"name": string,"organization_id"?: string,"owner_email"?: string | null,"owner_name"?: string | null,"platform": Database["public"]['Enums']["store_platform"],"status"?: Database["public"]['Enums']["store_status"],"store_url"?: string | null,"sync_enabled"?: boolean,"timezone"?: string,"token_expires_at"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"currency_code"?: string,"domain"?: string,"id"?: string,"last_sync_at"?: string | null,"name"?: string,"organization_id"?: string,"owner_email"?: string | null,"owner_name"?: string | null,"platform"?: Database["public"]['Enums']["store_platform"],"status"?: Database["public"]['Enums']["store_status"],"store_url"?: string | null,"sync_enabled"?: boolean,"timezone"?: string,"token_expires_at"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "stores_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"subscription_plans": {
                  Row: {
                    "created_at": string,"description": string | null,"features": NonNullable<Json>,"id": string,"is_active": boolean,"is_public": boolean,"name": string,"slug": string,"sort_order": number,"tier": Database["public"]['Enums']["org_tier"] | null,"trial_days": number,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"description"?: string | null,"features"?: NonNullable<Json>,"id"?: string,"is_active"?: boolean,"is_public"?: boolean,"name": string,"slug": string,"sort_order"?: number,"tier"?: Database["public"]['Enums']["org_tier"] | null,"trial_days"?: number,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"description"?: string | null,"features"?: NonNullable<Json>,"id"?: string,"is_active"?: boolean,"is_public"?: boolean,"name"?: string,"slug"?: string,"sort_order"?: number,"tier"?: Database["public"]['Enums']["org_tier"] | null,"trial_days"?: number,"updated_at"?: string
                  }
                  Relationships: [
                    
                  ]
                },"subscriptions": {
                  Row: {
                    "anchor_on": string,"base_billed_from": string | null,"base_billed_minor": number | null,"billing_cycle": Database["public"]['Enums']["billing_cycle"],"billing_hold": string | null,"cancel_at_period_end": boolean,"cancelled_at": string | null,"created_at": string,"current_period_end": string,"current_period_start": string,"id": string,"metadata": NonNullable<Json>,"next_invoice_at": string | null,"next_plan_price_id": string | null,"organization_id": string,"past_due_since": string | null,"paused_at": string | null,"period_no": number,"plan_id": string,"plan_price_id": string,"status": Database["public"]['Enums']["subscription_status"],"timezone": string,"trial_ends_at": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "anchor_on": string,"base_billed_from"?: string | null,"base_billed_minor"?: number | null,"billing_cycle": Database["public"]['Enums']["billing_cycle"],"billing_hold"?: string | null,"cancel_at_period_end"?: boolean,"cancelled_at"?: string | null,"created_at"?: string,"current_period_end": string,"current_period_start": string,"id"?: string,"metadata"?: NonNullable<Json>,"next_invoice_at"?: string | null,"next_plan_price_id"?: string | null,"organization_id": string,"past_due_since"?: string | null,"paused_at"?: string | null,"period_no"?: number,"plan_id": string,"plan_price_id": string,"status": Database["public"]['Enums']["subscription_status"],"timezone": string,"trial_ends_at"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "anchor_on"?: string,"base_billed_from"?: string | null,"base_billed_minor"?: number | null,"billing_cycle"?: Database["public"]['Enums']["billing_cycle"],"billing_hold"?: string | null,"cancel_at_period_end"?: boolean,"cancelled_at"?: string | null,"created_at"?: string,"current_period_end"?: string,"current_period_start"?: string,"id"?: string,"metadata"?: NonNullable<Json>,"next_invoice_at"?: string | null,"next_plan_price_id"?: string | null,"organization_id"?: string,"past_due_since"?: string | null,"paused_at"?: string | null,"period_no"?: number,"plan_id"?: string,"plan_price_id"?: string,"status"?: Database["public"]['Enums']["subscription_status"],"timezone"?: string,"trial_ends_at"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "subscriptions_next_plan_price_id_fkey"
      columns: ["next_plan_price_id"]
isOneToOne: false
      referencedRelation: "plan_prices"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "subscriptions_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "subscriptions_plan_id_fkey"
      columns: ["plan_id"]
isOneToOne: false
      referencedRelation: "subscription_plans"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "subscriptions_plan_price_id_fkey"
      columns: ["plan_price_id"]
isOneToOne: false
      referencedRelation: "plan_prices"
      referencedColumns: ["id"]
    }
                  ]
                },"suppressions": {
                  Row: {
                    "created_at": string,"organization_id": string,"phone_number": string,"reason": string | null,"source": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"organization_id"?: string,"phone_number": string,"reason"?: string | null,"source"?: string
                  }
                  Update: {
                    "created_at"?: string,"organization_id"?: string,"phone_number"?: string,"reason"?: string | null,"source"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "suppressions_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"tax_rates": {
                  Row: {
                    "buyer": string,"country_code": string,"created_at": string,"id": string,"name": string,"note": string | null,"position": number,"rate_bp": number,"scope": string,"supplier_country_code": string | null,"treatment": string,"valid_from": string,"valid_to": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "buyer"?: string,"country_code": string,"created_at"?: string,"id"?: string,"name": string,"note"?: string | null,"position"?: number,"rate_bp": number,"scope"?: string,"supplier_country_code"?: string | null,"treatment"?: string,"valid_from"?: string,"valid_to"?: string | null
                  }
                  Update: {
                    "buyer"?: string,"country_code"?: string,"created_at"?: string,"id"?: string,"name"?: string,"note"?: string | null,"position"?: number,"rate_bp"?: number,"scope"?: string,"supplier_country_code"?: string | null,"treatment"?: string,"valid_from"?: string,"valid_to"?: string | null
                  }
                  Relationships: [
                    
                  ]
                },"usage_days": {
                  Row: {
                    "day": string,"events": number,"meter_key": string,"organization_id": string,"prepaid": number,"quantity": number
                  }
                  ComputedFields: never
                  Insert: {
                    "day": string,"events"?: number,"meter_key": string,"organization_id": string,"prepaid"?: number,"quantity"?: number
                  }
                  Update: {
                    "day"?: string,"events"?: number,"meter_key"?: string,"organization_id"?: string,"prepaid"?: number,"quantity"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "usage_days_meter_key_fkey"
      columns: ["meter_key"]
isOneToOne: false
      referencedRelation: "meters"
      referencedColumns: ["key"]
    },{
      foreignKeyName: "usage_days_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"usage_logs": {
                  Row: {
                    "billed_count": number | null,"closed_at": string | null,"created_at": string,"feature_key": string,"id": string,"metadata": NonNullable<Json>,"organization_id": string,"period_end": string,"period_start": string,"plan_price_id": string | null,"prepaid": number,"reserved": number,"usage_count": number
                  }
                  ComputedFields: never
                  Insert: {
                    "billed_count"?: number | null,"closed_at"?: string | null,"created_at"?: string,"feature_key": string,"id"?: string,"metadata"?: NonNullable<Json>,"organization_id": string,"period_end": string,"period_start": string,"plan_price_id"?: string | null,"prepaid"?: number,"reserved"?: number,"usage_count"?: number
                  }
                  Update: {
                    "billed_count"?: number | null,"closed_at"?: string | null,"created_at"?: string,"feature_key"?: string,"id"?: string,"metadata"?: NonNullable<Json>,"organization_id"?: string,"period_end"?: string,"period_start"?: string,"plan_price_id"?: string | null,"prepaid"?: number,"reserved"?: number,"usage_count"?: number
                  }
                  Relationships: [
                    {
      foreignKeyName: "usage_logs_feature_key_fkey"
      columns: ["feature_key"]
isOneToOne: false
      referencedRelation: "meters"
      referencedColumns: ["key"]
    },{
      foreignKeyName: "usage_logs_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "usage_logs_plan_price_id_fkey"
      columns: ["plan_price_id"]
isOneToOne: false
      referencedRelation: "plan_prices"
      referencedColumns: ["id"]
    }
                  ]
                },"user_settings": {
                  Row: {
                    "created_at": string,"elevenlabs_voice_id": string | null,"id": string,"organization_id": string,"twilio_account_sid": string | null,"twilio_phone": string | null,"updated_at": string,"user_id": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"elevenlabs_voice_id"?: string | null,"id"?: string,"organization_id"?: string,"twilio_account_sid"?: string | null,"twilio_phone"?: string | null,"updated_at"?: string,"user_id"?: string
                  }
                  Update: {
                    "created_at"?: string,"elevenlabs_voice_id"?: string | null,"id"?: string,"organization_id"?: string,"twilio_account_sid"?: string | null,"twilio_phone"?: string | null,"updated_at"?: string,"user_id"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "user_settings_organization_id_user_id_fkey"
      columns: ["organization_id","user_id"]
isOneToOne: true
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"webhook_endpoints": {
                  Row: {
                    "created_at": string,"created_by": string | null,"description": string | null,"disabled_at": string | null,"disabled_reason": string | null,"enabled": boolean,"events": (string)[],"failing_since": string | null,"id": string,"is_slow": boolean,"organization_id": string,"updated_at": string,"url": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"created_by"?: string | null,"description"?: string | null,"disabled_at"?: string | null,"disabled_reason"?: string | null,"enabled"?: boolean,"events"?: (string)[],"failing_since"?: string | null,"id"?: string,"is_slow"?: boolean,"organization_id": string,"updated_at"?: string,"url": string
                  }
                  Update: {
                    "created_at"?: string,"created_by"?: string | null,"description"?: string | null,"disabled_at"?: string | null,"disabled_reason"?: string | null,"enabled"?: boolean,"events"?: (string)[],"failing_since"?: string | null,"id"?: string,"is_slow"?: boolean,"organization_id"?: string,"updated_at"?: string,"url"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "webhook_endpoints_organization_id_created_by_fkey"
      columns: ["organization_id","created_by"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "webhook_endpoints_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    }
                  ]
                },"webhook_sources": {
                  Row: {
                    "created_at": string,"id": string,"is_active": boolean,"name": string,"organization_id": string | null,"previous_until": string | null,"provider": string,"secrets_sealed": (string)[],"settings": NonNullable<Json>,"store_id": string | null,"updated_at": string
                  }
                  ComputedFields: never
                  Insert: {
                    "created_at"?: string,"id"?: string,"is_active"?: boolean,"name": string,"organization_id"?: string | null,"previous_until"?: string | null,"provider": string,"secrets_sealed": (string)[],"settings"?: NonNullable<Json>,"store_id"?: string | null,"updated_at"?: string
                  }
                  Update: {
                    "created_at"?: string,"id"?: string,"is_active"?: boolean,"name"?: string,"organization_id"?: string | null,"previous_until"?: string | null,"provider"?: string,"secrets_sealed"?: (string)[],"settings"?: NonNullable<Json>,"store_id"?: string | null,"updated_at"?: string
                  }
                  Relationships: [
                    {
      foreignKeyName: "webhook_sources_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "webhook_sources_organization_id_store_id_fkey"
      columns: ["organization_id","store_id"]
isOneToOne: false
      referencedRelation: "stores"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                },"websocket_sessions": {
                  Row: {
                    "agent_id": string | null,"call_log_id": string | null,"connection_id": string,"created_at": string,"id": string,"kind": string,"last_ping_at": string,"metadata": NonNullable<Json>,"organization_id": string,"user_id": string | null
                  }
                  ComputedFields: never
                  Insert: {
                    "agent_id"?: string | null,"call_log_id"?: string | null,"connection_id": string,"created_at"?: string,"id"?: string,"kind": string,"last_ping_at"?: string,"metadata"?: NonNullable<Json>,"organization_id": string,"user_id"?: string | null
                  }
                  Update: {
                    "agent_id"?: string | null,"call_log_id"?: string | null,"connection_id"?: string,"created_at"?: string,"id"?: string,"kind"?: string,"last_ping_at"?: string,"metadata"?: NonNullable<Json>,"organization_id"?: string,"user_id"?: string | null
                  }
                  Relationships: [
                    {
      foreignKeyName: "websocket_sessions_organization_id_call_log_id_fkey"
      columns: ["organization_id","call_log_id"]
isOneToOne: false
      referencedRelation: "call_logs"
      referencedColumns: ["organization_id","id"]
    },{
      foreignKeyName: "websocket_sessions_organization_id_fkey"
      columns: ["organization_id"]
isOneToOne: false
      referencedRelation: "organizations"
      referencedColumns: ["id"]
    },{
      foreignKeyName: "websocket_sessions_organization_id_user_id_fkey"
      columns: ["organization_id","user_id"]
isOneToOne: false
      referencedRelation: "profiles"
      referencedColumns: ["organization_id","id"]
    }
                  ]
                }
          }
          Views: {
            [_ in never]: never
          }
          Functions: {
            "accept_invitation":
{ Args: { "invitation_id"?: string,"token"?: string }; Returns: Json
                           },
"apply_event":
{ Args: { "": Json }; Returns: Json
                           },
"apply_retention":
{ Args: { "": Json }; Returns: Json
                           },
"archive_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"auth_has_permission":
{ Args: { "permission": string }; Returns: boolean
                           },
"auto_complete_inactive_conversations":
{ Args: { "": Json }; Returns: Json
                           },
"begin_deliveries":
{ Args: { "": Json }; Returns: Json
                           },
"begin_dials":
{ Args: { "": Json }; Returns: Json
                           },
"book_calls":
{ Args: { "": Json }; Returns: Json
                           },
"cancel_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"cancel_subscription":
{ Args: { "idempotency_key"?: string,"reason"?: string,"timing"?: string }; Returns: Json
                           },
"change_subscription":
{ Args: { "cycle"?: string,"idempotency_key"?: string,"plan": string,"timing"?: string }; Returns: Json
                           },
"check_feature_quota":
{ Args: { "current_usage"?: number,"feature_key": string }; Returns: boolean
                           },
"check_transfer":
{ Args: { "call_id": string,"phone_number": string }; Returns: Json
                           },
"claim_carrier_check":
{ Args: { "": Json }; Returns: Json
                           },
"claim_collections":
{ Args: { "": Json }; Returns: Json
                           },
"claim_deletions":
{ Args: { "": Json }; Returns: Json
                           },
"claim_deliveries":
{ Args: { "": Json }; Returns: Json
                           },
"claim_recordings":
{ Args: { "": Json }; Returns: Json
                           },
"claim_restore_page":
{ Args: { "": Json }; Returns: Json
                           },
"close_periods":
{ Args: { "": Json }; Returns: Json
                           },
"close_websocket":
{ Args: { "": Json }; Returns: Json
                           },
"collect_invoice":
{ Args: { "idempotency_key"?: string,"invoice_id": string }; Returns: Json
                           },
"complete_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"complete_privacy_request":
{ Args: { "request_id": string }; Returns: Json
                           },
"count_events":
{ Args: { "": Json }; Returns: Json
                           },
"count_webhook_events":
{ Args: { "since"?: string }; Returns: Json
                           },
"create_api_key":
{ Args: { "name": string,"scopes": (string)[] }; Returns: Json
                           },
"create_campaign":
{ Args: { "name": string,"project_id"?: string,"settings"?: Json }; Returns: Json
                           },
"create_invitation":
{ Args: { "email": string,"role_id"?: string,"system_role"?: Database["public"]['Enums']["system_role"] }; Returns: Json
                           },
"create_organization":
{ Args: { "country_code"?: string,"name": string,"state_code"?: string,"timezone"?: string }; Returns: Json
                           },
"create_webhook_endpoint":
{ Args: { "description"?: string,"endpoint_id": string,"events"?: (string)[],"secret_sealed": string,"url": string }; Returns: Json
                           },
"create_webhook_source":
{ Args: { "id": string,"name": string,"provider": string,"secret_sealed": string,"settings"?: Json,"store_id"?: string }; Returns: Json
                           },
"delete_webhook_endpoint":
{ Args: { "endpoint_id": string }; Returns: Json
                           },
"end_impersonation":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"erase":
{ Args: { "": Json }; Returns: Json
                           },
"erase_person":
{ Args: { "email"?: string,"phone"?: string }; Returns: Json
                           },
"expire_credit":
{ Args: { "": Json }; Returns: Json
                           },
"expire_reservations":
{ Args: { "": Json }; Returns: Json
                           },
"expire_usage_holds":
{ Args: { "": Json }; Returns: Json
                           },
"export_gstr1":
{ Args: { "from_day": string,"to_day": string }; Returns: Json
                           },
"export_invoice_lines":
{ Args: { "from_day": string,"to_day": string }; Returns: Json
                           },
"export_invoices":
{ Args: { "from_day": string,"to_day": string }; Returns: Json
                           },
"export_line_calls":
{ Args: { "invoice_id": string,"line": number }; Returns: Json
                           },
"export_payments":
{ Args: { "from_day": string,"to_day": string }; Returns: Json
                           },
"forget_payment_method":
{ Args: { "payment_method_id": string }; Returns: Json
                           },
"get_auth_org_id":
{ Args: Record<PropertyKey, never>; Returns: string
                           },
"get_auth_role_id":
{ Args: Record<PropertyKey, never>; Returns: string
                           },
"get_auth_system_role":
{ Args: Record<PropertyKey, never>; Returns: Database["public"]['Enums']["system_role"]
                           },
"get_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"get_credit_note":
{ Args: { "credit_note_id": string }; Returns: Json
                           },
"get_dial_evidence":
{ Args: { "phone_number": string }; Returns: Json
                           },
"get_event":
{ Args: { "": Json }; Returns: Json
                           },
"get_event_delivery":
{ Args: { "delivery_id": string }; Returns: Json
                           },
"get_invoice":
{ Args: { "invoice_id": string }; Returns: Json
                           },
"get_org_subscription":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"get_usage":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"get_usage_daily":
{ Args: { "from_day"?: string,"meter"?: string,"to_day"?: string }; Returns: Json
                           },
"get_usage_overview":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"get_webhook_event":
{ Args: { "id": string }; Returns: Json
                           },
"hang_up_call":
{ Args: { "call_id": string }; Returns: Json
                           },
"hold_usage":
{ Args: { "": Json }; Returns: Json
                           },
"ingest_leads":
{ Args: { "": Json }; Returns: Json
                           },
"issue_credit_note":
{ Args: { "": Json }; Returns: Json
                           },
"judge_transfer":
{ Args: { "": Json }; Returns: Json
                           },
"leave_organization":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"list_events":
{ Args: { "": Json }; Returns: Json
                           },
"list_unmapped_values":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"list_webhook_events":
{ Args: { "filter"?: Json }; Returns: Json
                           },
"move_stage":
{ Args: { "position": number,"stage_id": string }; Returns: Json
                           },
"open_document":
{ Args: { "": Json }; Returns: Json
                           },
"open_hangup":
{ Args: { "": Json }; Returns: Json
                           },
"open_inbound_call":
{ Args: { "": Json }; Returns: Json
                           },
"open_payment":
{ Args: { "": Json }; Returns: Json
                           },
"open_recording":
{ Args: { "call_id": string }; Returns: Json
                           },
"open_source":
{ Args: { "": Json }; Returns: Json
                           },
"open_usage":
{ Args: { "": Json }; Returns: Json
                           },
"open_websocket":
{ Args: { "": Json }; Returns: Json
                           },
"order_property_images":
{ Args: { "image_ids": (string)[],"property_id": string }; Returns: Json
                           },
"pause_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"pause_subscription":
{ Args: { "idempotency_key"?: string }; Returns: Json
                           },
"ping_websockets":
{ Args: { "": Json }; Returns: Json
                           },
"place_call":
{ Args: { "campaign_id": string,"lead_id": string }; Returns: Json
                           },
"preview_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"preview_invoice":
{ Args: Record<PropertyKey, never>; Returns: Json
                           },
"preview_subscription_change":
{ Args: { "cycle"?: string,"plan": string,"timing"?: string }; Returns: Json
                           },
"reap_impersonations":
{ Args: { "": Json }; Returns: Json
                           },
"reap_websockets":
{ Args: { "": Json }; Returns: Json
                           },
"reconcile_calls":
{ Args: { "": Json }; Returns: Json
                           },
"reconcile_usage":
{ Args: { "": Json }; Returns: Json
                           },
"record_collections":
{ Args: { "": Json }; Returns: Json
                           },
"record_deletions":
{ Args: { "": Json }; Returns: Json
                           },
"record_deliveries":
{ Args: { "": Json }; Returns: Json
                           },
"record_dials":
{ Args: { "": Json }; Returns: Json
                           },
"record_payment":
{ Args: { "": Json }; Returns: Json
                           },
"record_recordings":
{ Args: { "": Json }; Returns: Json
                           },
"record_refund":
{ Args: { "": Json }; Returns: Json
                           },
"record_usage":
{ Args: { "": Json }; Returns: Json
                           },
"redeem_coupon":
{ Args: { "code": string,"idempotency_key"?: string }; Returns: Json
                           },
"redrive_events":
{ Args: { "": Json }; Returns: Json
                           },
"redrive_webhook_events":
{ Args: { "filter"?: Json,"ids"?: (string)[] }; Returns: Json
                           },
"release_calls":
{ Args: { "": Json }; Returns: Json
                           },
"release_usage_hold":
{ Args: { "": Json }; Returns: Json
                           },
"remove_member":
{ Args: { "user_id": string }; Returns: Json
                           },
"remove_payment_method":
{ Args: { "": Json }; Returns: Json
                           },
"renew_credit":
{ Args: { "": Json }; Returns: Json
                           },
"replay_deliveries":
{ Args: { "endpoint_id": string,"since": string,"until"?: string }; Returns: Json
                           },
"replay_delivery":
{ Args: { "delivery_id": string }; Returns: Json
                           },
"request_mandate":
{ Args: { "gateway"?: string,"idempotency_key"?: string,"method"?: string }; Returns: Json
                           },
"request_payment_link":
{ Args: { "invoice_id": string }; Returns: Json
                           },
"request_refund":
{ Args: { "": Json }; Returns: Json
                           },
"reserve_property":
{ Args: { "held_until"?: string,"lead_id"?: string,"property_id": string }; Returns: Json
                           },
"restore_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"resume_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"resume_subscription":
{ Args: { "idempotency_key"?: string }; Returns: Json
                           },
"retry_call":
{ Args: { "call_id": string }; Returns: Json
                           },
"revoke_consent":
{ Args: { "consent_id": string,"reason"?: string }; Returns: Json
                           },
"revoke_invitation":
{ Args: { "invitation_id": string }; Returns: Json
                           },
"roll_up_call_analytics":
{ Args: { "": Json }; Returns: Json
                           },
"rotate_webhook_secret":
{ Args: { "endpoint_id": string,"secret_sealed": string }; Returns: Json
                           },
"rotate_webhook_source_secret":
{ Args: { "keep_previous_seconds"?: number,"secret_sealed": string,"source_id": string }; Returns: Json
                           },
"save_payment_method":
{ Args: { "": Json }; Returns: Json
                           },
"schedule_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"set_member_role":
{ Args: { "role_id"?: string,"system_role": Database["public"]['Enums']["system_role"],"user_id": string }; Returns: Json
                           },
"set_member_status":
{ Args: { "status": Database["public"]['Enums']["user_status"],"user_id": string }; Returns: Json
                           },
"set_property_status":
{ Args: { "property_id": string,"status": string }; Returns: Json
                           },
"set_webhook_endpoint":
{ Args: { "enabled": boolean,"endpoint_id": string }; Returns: Json
                           },
"set_webhook_source_active":
{ Args: { "is_active": boolean,"source_id": string }; Returns: Json
                           },
"start_campaign":
{ Args: { "campaign_id": string }; Returns: Json
                           },
"start_impersonation":
{ Args: { "minutes"?: number,"read_only"?: boolean,"reason": string,"target_user_id": string }; Returns: Json
                           },
"store_carrier_records":
{ Args: { "": Json }; Returns: Json
                           },
"sweep_events":
{ Args: { "": Json }; Returns: Json
                           },
"test_webhook_endpoint":
{ Args: { "endpoint_id": string }; Returns: Json
                           },
"update_webhook_endpoint":
{ Args: { "description"?: string,"endpoint_id": string,"events"?: (string)[],"url"?: string }; Returns: Json
                           }
          }
          Enums: {
            "attempt_status": "created"|"submitting"|"submission_unknown"|"queued"|"initiated"|"ringing"|"in_progress"|"ended","billing_cycle": "monthly"|"quarterly"|"yearly","call_direction": "inbound"|"outbound","call_outcome": "answered"|"machine"|"busy"|"no_answer"|"rejected"|"invalid_number"|"cancelled"|"capacity"|"carrier_transient"|"spam_blocked"|"our_fault"|"config"|"lost"|"expired"|"failed","call_status": "initiated"|"ringing"|"answered"|"completed"|"failed"|"busy"|"no_answer"|"cancelled","campaign_lead_status": "enrolled"|"queued"|"calling"|"called"|"failed"|"opted_out"|"skipped"|"archived","campaign_status": "draft"|"scheduled"|"running"|"paused"|"completed"|"cancelled"|"archived"|"failed","carrier_provider": "plivo"|"twilio"|"telnyx"|"vonage","conversation_channel": "voice"|"chat"|"email"|"sms"|"whatsapp","conversation_status": "active"|"paused"|"completed"|"escalated"|"abandoned"|"resolved","credit_account_kind": "monthly"|"promotional"|"purchased"|"payments"|"grants"|"consumption"|"expiry"|"adjustments","credit_note_status": "draft"|"issued","credit_transaction_type": "purchase"|"monthly_grant"|"promotional_grant"|"consumption"|"refund"|"adjustment"|"expiry","event_status": "applied"|"ignored"|"orphan"|"failed"|"dead","fulfillment_status": "unfulfilled"|"partial"|"fulfilled"|"restocked"|"cancelled","invoice_status": "draft"|"open"|"paid"|"void"|"uncollectible","ledger_side": "debit"|"credit","message_role": "customer"|"ai_assistant"|"human_agent"|"system","message_type": "text"|"audio"|"image"|"file"|"system_event"|"action_result","order_status": "pending"|"confirmed"|"processing"|"shipped"|"delivered"|"cancelled"|"refunded"|"returned","org_tier": "free"|"starter"|"pro"|"enterprise","payment_gateway": "razorpay"|"stripe"|"manual","payment_method_type": "card"|"upi"|"bank_transfer"|"razorpay"|"stripe","payment_status": "pending"|"paid"|"partially_paid"|"refunded"|"partially_refunded"|"failed"|"cancelled","payment_transaction_status": "pending"|"authorized"|"failed"|"captured"|"refunded","product_availability": "in_stock"|"out_of_stock"|"low_stock"|"backorder"|"discontinued","product_status": "active"|"draft"|"archived"|"discontinued","queue_status": "queued"|"processing"|"completed"|"failed","refund_status": "pending"|"processed"|"failed","setting_category": "voice"|"ai"|"integration"|"notification"|"security"|"general","store_platform": "shopify"|"woocommerce"|"magento"|"bigcommerce"|"custom","store_status": "connected"|"disconnected"|"error"|"pending","subscription_status": "trialing"|"active"|"past_due"|"suspended"|"paused"|"cancelled"|"inactive","system_role": "owner"|"admin"|"member"|"platform_admin","user_status": "invited"|"active"|"suspended"|"archived"
          }
          CompositeTypes: {
            [_ in never]: never
          }
        }
}

type DatabaseWithoutInternals = Omit<Database, '__InternalSupabase'>

type DefaultSchema = DatabaseWithoutInternals[Extract<keyof Database, "public">]

export type Tables<
  DefaultSchemaTableNameOrOptions extends
    | keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
        DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? (DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"] &
      DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Views"])[TableName] extends {
      Row: infer R
    }
    ? R
    : never
  : DefaultSchemaTableNameOrOptions extends keyof (DefaultSchema["Tables"] & DefaultSchema["Views"])
  ? (DefaultSchema["Tables"] & DefaultSchema["Views"])[DefaultSchemaTableNameOrOptions] extends {
      Row: infer R
    }
    ? R
    : never
  : never

export type TablesInsert<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Insert: infer I
    }
    ? I
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Insert: infer I
    }
    ? I
    : never
  : never

export type TablesUpdate<
  DefaultSchemaTableNameOrOptions extends
    | keyof DefaultSchema["Tables"]
    | { schema: keyof DatabaseWithoutInternals },
  TableName extends DefaultSchemaTableNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"]
    : never = never
> = DefaultSchemaTableNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaTableNameOrOptions["schema"]]["Tables"][TableName] extends {
      Update: infer U
    }
    ? U
    : never
  : DefaultSchemaTableNameOrOptions extends keyof DefaultSchema["Tables"]
  ? DefaultSchema["Tables"][DefaultSchemaTableNameOrOptions] extends {
      Update: infer U
    }
    ? U
    : never
  : never

export type Enums<
  DefaultSchemaEnumNameOrOptions extends
    | keyof DefaultSchema["Enums"]
    | { schema: keyof DatabaseWithoutInternals },
  EnumName extends DefaultSchemaEnumNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"]
    : never = never
> = DefaultSchemaEnumNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[DefaultSchemaEnumNameOrOptions["schema"]]["Enums"][EnumName]
  : DefaultSchemaEnumNameOrOptions extends keyof DefaultSchema["Enums"]
  ? DefaultSchema["Enums"][DefaultSchemaEnumNameOrOptions]
  : never

export type CompositeTypes<
  PublicCompositeTypeNameOrOptions extends
    | keyof DefaultSchema["CompositeTypes"]
    | { schema: keyof DatabaseWithoutInternals },
  CompositeTypeName extends PublicCompositeTypeNameOrOptions extends {
    schema: keyof DatabaseWithoutInternals
  }
    ? keyof DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"]
    : never = never
> = PublicCompositeTypeNameOrOptions extends { schema: keyof DatabaseWithoutInternals }
  ? DatabaseWithoutInternals[PublicCompositeTypeNameOrOptions["schema"]]["CompositeTypes"][CompositeTypeName]
  : PublicCompositeTypeNameOrOptions extends keyof DefaultSchema["CompositeTypes"]
  ? DefaultSchema["CompositeTypes"][PublicCompositeTypeNameOrOptions]
  : never

export const Constants = {
  "public": {
          Enums: {
            "attempt_status": ["created", "submitting", "submission_unknown", "queued", "initiated", "ringing", "in_progress", "ended"],"billing_cycle": ["monthly", "quarterly", "yearly"],"call_direction": ["inbound", "outbound"],"call_outcome": ["answered", "machine", "busy", "no_answer", "rejected", "invalid_number", "cancelled", "capacity", "carrier_transient", "spam_blocked", "our_fault", "config", "lost", "expired", "failed"],"call_status": ["initiated", "ringing", "answered", "completed", "failed", "busy", "no_answer", "cancelled"],"campaign_lead_status": ["enrolled", "queued", "calling", "called", "failed", "opted_out", "skipped", "archived"],"campaign_status": ["draft", "scheduled", "running", "paused", "completed", "cancelled", "archived", "failed"],"carrier_provider": ["plivo", "twilio", "telnyx", "vonage"],"conversation_channel": ["voice", "chat", "email", "sms", "whatsapp"],"conversation_status": ["active", "paused", "completed", "escalated", "abandoned", "resolved"],"credit_account_kind": ["monthly", "promotional", "purchased", "payments", "grants", "consumption", "expiry", "adjustments"],"credit_note_status": ["draft", "issued"],"credit_transaction_type": ["purchase", "monthly_grant", "promotional_grant", "consumption", "refund", "adjustment", "expiry"],"event_status": ["applied", "ignored", "orphan", "failed", "dead"],"fulfillment_status": ["unfulfilled", "partial", "fulfilled", "restocked", "cancelled"],"invoice_status": ["draft", "open", "paid", "void", "uncollectible"],"ledger_side": ["debit", "credit"],"message_role": ["customer", "ai_assistant", "human_agent", "system"],"message_type": ["text", "audio", "image", "file", "system_event", "action_result"],"order_status": ["pending", "confirmed", "processing", "shipped", "delivered", "cancelled", "refunded", "returned"],"org_tier": ["free", "starter", "pro", "enterprise"],"payment_gateway": ["razorpay", "stripe", "manual"],"payment_method_type": ["card", "upi", "bank_transfer", "razorpay", "stripe"],"payment_status": ["pending", "paid", "partially_paid", "refunded", "partially_refunded", "failed", "cancelled"],"payment_transaction_status": ["pending", "authorized", "failed", "captured", "refunded"],"product_availability": ["in_stock", "out_of_stock", "low_stock", "backorder", "discontinued"],"product_status": ["active", "draft", "archived", "discontinued"],"queue_status": ["queued", "processing", "completed", "failed"],"refund_status": ["pending", "processed", "failed"],"setting_category": ["voice", "ai", "integration", "notification", "security", "general"],"store_platform": ["shopify", "woocommerce", "magento", "bigcommerce", "custom"],"store_status": ["connected", "disconnected", "error", "pending"],"subscription_status": ["trialing", "active", "past_due", "suspended", "paused", "cancelled", "inactive"],"system_role": ["owner", "admin", "member", "platform_admin"],"user_status": ["invited", "active", "suspended", "archived"]
          }
        }
} as const
