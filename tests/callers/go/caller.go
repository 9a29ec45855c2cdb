// A caller in Go. All it knows stands in the README, "On the wire", and in schemas/asyncapi.json.
package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	mathrand "math/rand/v2"
	"strconv"
	"sync"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
)

// CallError is the error of a reply, or one of the caller's own with the same meaning.
type CallError struct {
	Code      string         `json:"code"`
	Message   string         `json:"message"`
	Retryable bool           `json:"retryable"`
	Details   map[string]any `json:"details"`
}

func (e *CallError) Error() string { return e.Code + ": " + e.Message }

var lost = &CallError{"ERR_SHUTTING_DOWN", "The connection to the broker was lost.", true, nil}

// Rack calls the worker of one rack. Any number of calls may be in flight at once.
type Rack struct {
	URL, Name string
	OnHint    func(json.RawMessage)
	mutex     sync.Mutex
	current   *link
}

// Call returns the reply, or a *CallError. What is retryable is tried again until the time is over, with the same key.
func (r *Rack) Call(method string, params json.RawMessage, timeout time.Duration, key string) (json.RawMessage, *CallError) {
	if key == "" {
		key = rand.Text()
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	for ceiling := 50 * time.Millisecond; ; ceiling = min(2*ceiling, 3*time.Second) {
		reply, err := r.once(ctx, method, params, key)
		if err == nil || !err.Retryable {
			return reply, err
		}
		after, _ := err.Details["retryAfterMs"].(float64)
		pause := time.Duration(after)*time.Millisecond + mathrand.N(ceiling)
		if until, _ := ctx.Deadline(); time.Until(until) <= pause {
			return nil, err
		}
		time.Sleep(pause)
	}
}

func (r *Rack) once(ctx context.Context, method string, params json.RawMessage, key string) (json.RawMessage, *CallError) {
	l, err := r.connected()
	if err != nil {
		return nil, &CallError{"ERR_SHUTTING_DOWN", fmt.Sprintf("The broker cannot be reached: %v", err), true, nil}
	}
	id, waiter := rand.Text(), make(chan answer, 1)
	l.mutex.Lock()
	l.waiters[id] = waiter
	l.mutex.Unlock()
	defer l.answer(id, answer{}) // frees the place of a call that was given up
	deadline, _ := ctx.Deadline()
	confirm, err := l.channel.PublishWithDeferredConfirm("model-manager.rpc", r.Name+"."+method, true, false, amqp.Publishing{
		ContentType: "application/json", DeliveryMode: amqp.Persistent, ReplyTo: "amq.rabbitmq.reply-to", CorrelationId: id,
		MessageId: id, Type: method, Expiration: strconv.FormatInt(max(time.Until(deadline).Milliseconds(), 1), 10), Body: params,
		Headers: amqp.Table{"x-deadline": deadline.UnixMilli(), "x-idempotency-key": key},
	})
	if err != nil {
		return nil, lost
	}
	go func() {
		if taken, err := confirm.WaitContext(ctx); err == nil && !taken {
			l.answer(id, answer{err: &CallError{"ERR_OVERLOADED", "The queue of the rack is full.", true, nil}})
		}
	}()
	select {
	case <-ctx.Done():
		return nil, &CallError{"ERR_DEADLINE_EXCEEDED", "No answer in time.", true, nil}
	case a := <-waiter:
		reply := struct {
			Success bool
			Error   *CallError
		}{Error: &CallError{Code: "ERR_INTERNAL", Message: "That is not a reply."}}
		if a.err == nil && (json.Unmarshal(a.body, &reply) != nil || !reply.Success) {
			a.err = reply.Error
		}
		return a.body, a.err
	}
}
